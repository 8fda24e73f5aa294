"""Open a cache in a bucket through a mirror on this machine, and fetch its small files.

The manifest is fetched whenever a cache is opened. All else is fetched when it is needed: opening
asks for one object, however many units the cache has. A merged cache asks also for the manifests
and plans of the caches that it refers to; its mirror is of the folder that holds them all.
"""

import posixpath
from pathlib import Path

from decant.schemas.disk.layout import MANIFEST, TOKENIZER
from decant.schemas.manifest.manifest import Manifest, parse_manifest
from decant.schemas.reading.merged_parts import home_of, place_of, refresh_parts
from decant.store import url_of
from decant.store.mirror import Mirror, open_mirror


def open_remote(
    address: str | Path, *, place: Path | None, most_bytes: int | None
) -> tuple[Path, Manifest, Mirror]:
    """The cache at `address`: its folder in the mirror, manifest and mirror.

    Arguments as for `open_cache`. ValueError if there is no sealed cache, or one that refers to
    parts which are gone. StoreError if the bucket cannot be read or the mirror not be written.
    """
    url = str(url_of(address)).rstrip("/")
    path, manifest, mirror = _open(url, url, place, most_bytes)
    homes = [home_of(place_of(url, p.path)) for p in manifest.parts if p.in_other_cache]
    if not homes:
        return path, manifest, mirror
    root = url[: url.index("://") + 3] + posixpath.commonpath(
        [one.partition("://")[2] for one in (url, *homes)]
    )
    path, manifest, mirror = _open(url, root, place, most_bytes)
    try:
        return path, refresh_parts(path, manifest, mirror=mirror), mirror
    except ValueError as error:
        raise ValueError(str(error).replace(str(mirror.files), root)) from None


def _open(
    url: str, root: str, place: Path | None, most_bytes: int | None
) -> tuple[Path, Manifest, Mirror]:
    """The cache at `url` in a mirror of `root`, which is `url` or above it."""
    below = url[len(root) :].strip("/")
    first = f"{below}/{MANIFEST}" if below else MANIFEST
    try:
        mirror = open_mirror(root, first=first, place=place, most_bytes=most_bytes)
    except FileNotFoundError:
        raise ValueError(
            f"{url}: not a sealed cache, there is no {MANIFEST} in it. Check the address"
        ) from None
    path = mirror.files / below
    manifest = parse_manifest((path / MANIFEST).read_bytes(), where=f"{url}/{MANIFEST}")
    mirror.by_content = manifest.by_content
    return path, manifest, mirror


def fetch_tokenizer(mirror: Mirror, path: Path, manifest: Manifest) -> None:
    """Fetch the files in `tokenizer/` of the cache at `path`, if they are not in the mirror."""
    # Before release 0.8 manifests did not name them; their digest is checked by who uses them.
    names = [f"{TOKENIZER}/{name}" for name in manifest.tokenizer_files]
    for key in names or mirror.names(TOKENIZER):
        sha256 = manifest.tokenizer_files.get(key.removeprefix(f"{TOKENIZER}/"))
        mirror.whole(path / key, sha256=sha256)
