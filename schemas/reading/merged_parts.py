"""Parts of a merged cache that lie in other caches, brought up to date with those caches.

A merged cache refers to a part of another cache and lists the part's contents at merging. Later the
other cache may gain signals and forget documents; the merged cache then forgets these documents
too. If the other cache lost the part or a listed signal, opening the merged cache fails.
"""

import dataclasses
from pathlib import Path

from decant.schemas.disk.identity import file_sha256
from decant.schemas.disk.layout import MANIFEST, PARTS, PartLayout
from decant.schemas.manifest.manifest import Manifest, Part, read_manifest
from decant.schemas.manifest.plan import CANARY


def _cache_of(place: Path) -> Path:
    """The cache directory of the part directory `place`."""
    return place.parents[len(Path(PARTS).parts)]


def refresh_parts(cache: Path, manifest: Manifest) -> Manifest:
    """The manifest of `cache` with its parts in other caches as those caches hold them now.

    ValueError naming the part if it was moved or replaced, or if it lost a signal.
    """
    if not any(part.in_other_cache for part in manifest.parts):
        return manifest
    parts = tuple(
        _refresh_part(cache, part) if part.in_other_cache else part for part in manifest.parts
    )
    return dataclasses.replace(manifest, parts=parts)


def _refresh_part(cache: Path, part: Part) -> Part:
    place = (cache / part.path).resolve()
    plan, home = PartLayout(place).plan, _cache_of(place)
    if not plan.is_file() or not (home / MANIFEST).is_file():
        raise ValueError(
            f"{cache}: refers to a part of another cache, {place}, which is missing. Bring it "
            "back (move the caches together, so that relative paths stay valid), or merge again"
        )
    if (sha256 := file_sha256(plan)) != part.plan_sha256:
        raise ValueError(
            f"{plan}: sha256 {sha256[:12]}, but {cache} refers to a part with "
            f"{part.plan_sha256[:12]}: it now holds another capture. Restore the old one, or "
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
