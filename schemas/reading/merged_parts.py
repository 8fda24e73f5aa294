"""Parts that lie in other caches: what they hold now, by the manifest of the cache they belong to.

A merged cache names such a part and what it held. The other cache goes on living: it may gain
signals and forget documents, which a merged cache forgets with it. What it has lost is an error.
"""

import dataclasses
from pathlib import Path

from decant.schemas.disk.identity import file_sha256
from decant.schemas.disk.layout import MANIFEST, PARTS, PartLayout
from decant.schemas.manifest.manifest import Manifest, Part, read_manifest


def owner(place: Path) -> Path:
    """The cache that the part at `place` belongs to."""
    return place.parents[len(Path(PARTS).parts)]


def refresh_parts(cache: Path, manifest: Manifest) -> Manifest:
    """The manifest with its parts in other caches as they are now.

    ValueError that names the part if it is not where it was, if another lies there, or if it has
    lost a signal.
    """
    if not any(part.in_other_cache for part in manifest.parts):
        return manifest
    parts = tuple(
        _refresh_part(cache, part) if part.in_other_cache else part for part in manifest.parts
    )
    return dataclasses.replace(manifest, parts=parts)


def _refresh_part(cache: Path, part: Part) -> Part:
    place = (cache / part.path).resolve()
    plan, home = PartLayout(place).plan, owner(place)
    if not plan.is_file() or not (home / MANIFEST).is_file():
        raise ValueError(
            f"{cache}: refers to a part of another cache, {place}, which is not there. Bring it "
            "back (the caches move together, keeping their relative places), or merge again"
        )
    if (found := file_sha256(plan)) != part.plan_sha256:
        raise ValueError(
            f"{plan}: sha256 {found[:12]}, but {cache} refers to a part with "
            f"{part.plan_sha256[:12]}: another capture lies there now. Bring the old one back, or "
            "merge again"
        )
    now = next(
        (
            other
            for other in read_manifest(home).parts
            if (home / other.path).resolve() == place and other.numbers == part.numbers
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
    files = tuple(
        dataclasses.replace(there, files={name: there.files[name] for name in unit.files})
        for unit, there in zip(part.units, now.units, strict=True)
    )
    return dataclasses.replace(
        part, units=files, forgotten=now.forgotten, forgotten_rows=now.forgotten_rows
    )
