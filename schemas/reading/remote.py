"""Open a cache in a bucket through a mirror on this machine, and fetch its small files.

The manifest is fetched whenever a cache is opened. All else is fetched when it is needed: opening
asks for one object, however many units the cache has.
"""

from pathlib import Path

from decant.schemas.disk.layout import MANIFEST, TOKENIZER
from decant.schemas.manifest.manifest import Manifest, parse_manifest
from decant.store import url_of
from decant.store.mirror import Mirror, open_mirror


def open_remote(
    address: str | Path, *, place: Path | None, most_bytes: int | None
) -> tuple[Manifest, Mirror]:
    """The manifest and mirror of the cache at `address`; arguments as for `open_cache`.

    ValueError if there is no sealed cache, or one that refers to parts of other caches. StoreError
    if the bucket cannot be read or the mirror not be written.
    """
    url = str(url_of(address)).rstrip("/")
    try:
        mirror = open_mirror(url, first=MANIFEST, place=place, most_bytes=most_bytes)
    except FileNotFoundError:
        raise ValueError(
            f"{url}: not a sealed cache, there is no {MANIFEST} in it. Check the address"
        ) from None
    path = mirror.files / MANIFEST
    manifest = parse_manifest(path.read_bytes(), where=f"{url}/{MANIFEST}")
    mirror.by_content = manifest.by_content
    if elsewhere := [part.path for part in manifest.parts if part.in_other_cache]:
        raise ValueError(
            f"{url}: refers to a part of another cache, {elsewhere[0]}, which cannot be read from "
            "a bucket. Open the cache that holds this part, and train on several with "
            "[[data.caches]]"
        )
    return manifest, mirror


def fetch_tokenizer(mirror: Mirror, manifest: Manifest) -> None:
    """Fetch the files in `tokenizer/`, if they are not in the mirror."""
    # Before release 0.8 manifests did not name them; their digest is checked by who uses them.
    names = [f"{TOKENIZER}/{name}" for name in manifest.tokenizer_files]
    for key in names or mirror.names(TOKENIZER):
        sha256 = manifest.tokenizer_files.get(key.removeprefix(f"{TOKENIZER}/"))
        mirror.whole(mirror.files / key, sha256=sha256)
