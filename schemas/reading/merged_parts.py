"""Parts of a merged cache that lie in other caches, brought up to date with those caches.

A merged cache refers to a part of another cache and lists the part's contents at merging. Later the
other cache may gain signals and forget documents; the merged cache then forgets these documents
too. If the other cache lost the part or a listed signal, opening the merged cache fails.
"""

import dataclasses
import hashlib
import os
import posixpath
from dataclasses import dataclass, field
from pathlib import Path

from decant.schemas.disk.identity import file_sha256
from decant.schemas.disk.layout import MANIFEST, PARTS, PartLayout
from decant.schemas.manifest.manifest import Manifest, Part, parse_manifest, read_manifest
from decant.schemas.manifest.plan import CANARY
from decant.store import url_of
from decant.store.mirror import Mirror


def place_of(cache: str | Path, below: str = "") -> str:
    """Where the path `below` a cache leads, without `..` and links: a path or an address.

    ValueError if it leads out of the cache's bucket.
    """
    url = url_of(cache)
    if url is None:
        return str((Path(cache) / below).resolve())
    scheme, _, path = url.partition("://")
    place = posixpath.normpath(f"/{path}/{below}")
    if place.split("/")[1] != path.split("/")[0]:
        raise ValueError(f"{url}: refers to {below}, which is not in its bucket")
    return f"{scheme}:/{place}"


def home_of(place: str | Path) -> str:
    """The cache of the part directory `place`."""
    return str(place).rpartition(f"/{PARTS}/")[0]


def refresh_parts(cache: Path, manifest: Manifest, *, mirror: Mirror | None = None) -> Manifest:
    """The manifest of `cache` with its parts in other caches as those caches hold them now.

    `mirror` holds the folders of all of them, if they are in a bucket. ValueError naming the part
    if it was moved or replaced, or if it lost a signal.
    """
    if not any(part.in_other_cache for part in manifest.parts):
        return manifest
    around = _Around(mirror)
    parts = tuple(
        _refresh_part(cache, part, around) if part.in_other_cache else part
        for part in manifest.parts
    )
    return dataclasses.replace(manifest, parts=parts)


@dataclass
class _Around:
    """The caches that a merged one refers to, as they are now."""

    mirror: Mirror | None
    manifests: dict[Path, Manifest | None] = field(default_factory=dict)

    def place(self, cache: Path, below: str) -> Path:
        at = cache / below
        return Path(os.path.normpath(at)) if self.mirror else at.resolve()

    def plan_sha256(self, plan: Path) -> str | None:
        """None if there is no such plan."""
        if self.mirror is None:
            return file_sha256(plan) if plan.is_file() else None
        data = self.mirror.now(plan)
        return None if data is None else hashlib.sha256(data).hexdigest()

    def manifest(self, home: Path) -> Manifest | None:
        """None if there is no cache."""
        if home not in self.manifests:
            self.manifests[home] = self._manifest(home)
        return self.manifests[home]

    def _manifest(self, home: Path) -> Manifest | None:
        path = home / MANIFEST
        if self.mirror is None:
            return read_manifest(home) if path.is_file() else None
        data = self.mirror.now(path)
        if data is None:
            return None
        manifest = parse_manifest(data, where=path)
        if not manifest.by_content:
            raise ValueError(
                f"{home}: a release before 0.12 copied this cache there. `decant copy` it again"
            )
        return manifest


def _refresh_part(cache: Path, part: Part, around: _Around) -> Part:
    place = around.place(cache, part.path)
    plan, home = PartLayout(place).plan, Path(home_of(place))
    sha256, held = around.plan_sha256(plan), around.manifest(home)
    if sha256 is None or held is None:
        raise ValueError(
            f"{cache}: refers to a part of another cache, {place}, which is missing. Bring it "
            "back (move the caches together, so that relative paths stay valid), or merge again"
        )
    if sha256 != part.plan_sha256:
        raise ValueError(
            f"{plan}: sha256 {sha256[:12]}, but {cache} refers to a part with "
            f"{part.plan_sha256[:12]}: it now holds another capture. Restore the old one, or "
            "merge again"
        )
    now = next(
        (
            other
            for other in held.parts
            if around.place(home, other.path) == place and other.numbers == part.numbers
        ),
        None,
    )
    if now is None:
        raise ValueError(f"{home}: no longer names {place}, which {cache} refers to; merge again")
    for name, signal in part.signals.items():
        if now.signals.get(name) != signal:
            raise ValueError(
                f"{cache}: refers to {name} of {place}, which was removed from {home}; capture it "
                "there again, or merge again without it"
            )
    units = tuple(
        dataclasses.replace(new, files={name: new.files[name] for name in unit.files})
        for unit, new in zip(part.units, now.units, strict=True)
    )
    # `gc` deletes the canary targets of a part that has forgotten a canary row.
    gone = {name for name in part.statistics.keys() - now.statistics if name.startswith(CANARY)}
    return dataclasses.replace(
        part,
        units=units,
        statistics={name: sha for name, sha in part.statistics.items() if name not in gone},
        forgotten=now.forgotten,
        forgotten_rows=now.forgotten_rows,
    )
