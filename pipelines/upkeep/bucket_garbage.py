"""`gc` of a cache in a bucket: deletes objects that its manifest does not name, once they are old.

There is no lock that tells who works there. So nothing is deleted while a capture is unfinished,
nor within a grace period after the manifest or any unnamed object was written: somebody may still
be reading by an older manifest, or be adding to this one.
"""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from decant.pipelines.upkeep.garbage import own_directories
from decant.schemas.arrays.spec import METADATA
from decant.schemas.disk import steps
from decant.schemas.disk.inside import read_regular
from decant.schemas.disk.layout import (
    MANIFEST,
    RECORDS,
    ROWS,
    TOKENIZER,
    TOKENIZER_FILES,
    PartLayout,
    part_layout,
)
from decant.schemas.disk.stand_in import Bucket, bucket_of, each_of, exists, object_key
from decant.schemas.disk.steps import Step
from decant.schemas.manifest.commits import named_commit, sealed_commit, write_commit
from decant.schemas.manifest.manifest import Manifest, Part
from decant.schemas.signals import array_names
from decant.store.objects import Aged


@dataclass
class Unnamed:
    """Objects that the manifest does not name."""

    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes by key."""
    busy: list[str] = field(default_factory=list)
    """Paths of parts whose capture is unfinished: then nothing may be deleted."""
    since: datetime.datetime | None = None
    """When the manifest or the youngest of them was written; None if there is none."""


def unnamed_objects(cache: Path, manifest: Manifest) -> Unnamed:
    """What lies at the address of a cache and is not named by its manifest."""
    bucket = _bucket(cache)
    named = set(_named(bucket, cache, manifest))
    listed = {found.key: found for found in bucket.store.aged()}
    strays: list[Aged] = [
        found
        for key, found in listed.items()
        # The tokenizer's files may be older than their hashes.
        if key not in named and not key.startswith(f"{TOKENIZER}/")
    ]
    busy = list(_unfinished(cache, manifest))
    times = [found.modified for found in strays]
    if strays and MANIFEST in listed:
        times.append(listed[MANIFEST].modified)
    return Unnamed({f.key: f.size for f in strays}, busy, max(times, default=None))


def delete_objects(cache: Path, manifest: Manifest, keys: list[str]) -> None:
    """Delete objects; before that, put the commits of units that were written again in the places
    of the old ones, whose files go."""
    bucket = _bucket(cache)
    for part in _own(manifest):
        if part.forgotten:
            each_of(lambda pair, part=part: _settle(cache, part, *pair), _units(part), cache=cache)

    def delete(key: str) -> None:
        bucket.store.delete(key)
        steps.reached(Step.OBJECT_DELETED)

    each_of(delete, keys, cache=cache)


def _settle(cache: Path, part: Part, number: int, name: str) -> None:
    layout = PartLayout(cache / part.path)
    entry = dict(part.numbered_units)[number].files[name]
    commit, place, _ = sealed_commit(layout, name, number, entry, read_regular, by_content=True)
    if place != layout.commit(name, number):
        write_commit(layout.root, name, commit)


def _units(part: Part) -> list[tuple[int, str]]:
    return [(number, name) for number in part.unit_numbers for name in part.signals]


def _named(bucket: Bucket, cache: Path, manifest: Manifest) -> Iterator[str]:
    """Keys of all objects that belong to the sealed cache."""
    yield from (MANIFEST, TOKENIZER_FILES)
    for part in _own(manifest):
        layout = PartLayout(cache / part.path)
        yield from map(bucket.key, (layout.request, layout.plan))
        for file, sha256 in part.statistics.items():
            yield object_key(layout.statistics / file, sha256)
        for name, signal in part.signals.items():
            for array in array_names(name, signal):
                yield bucket.key(layout.array(array) / METADATA)
        for number, unit in part.numbered_units:
            for name, entry in unit.files.items():
                if name in (ROWS, *RECORDS):
                    yield object_key(layout.records(name, number), entry.sha256)
                if name != ROWS:
                    yield bucket.key(layout.commit(name, number))
                    yield bucket.key(named_commit(layout, name, number, entry))
        yield from _shards(cache, part)


def _own(manifest: Manifest) -> list[Part]:
    return [part for part in manifest.parts if not part.in_other_cache]


def _shards(cache: Path, part: Part) -> Iterator[str]:
    layout, units = PartLayout(cache / part.path), dict(part.numbered_units)

    def of_unit(pair: tuple[int, str]) -> list[str]:
        number, name = pair
        entry = units[number].files[name]
        commit, *_ = sealed_commit(layout, name, number, entry, read_regular, by_content=True)
        return [
            object_key(Path(shard.name), shard.sha256)
            for shards in commit.shards.values()
            for shard in shards
        ]

    arrays = [(number, name) for number, name in _units(part) if name not in RECORDS]
    for keys in each_of(of_unit, arrays, cache=cache):
        yield from keys


def _unfinished(cache: Path, manifest: Manifest) -> Iterator[str]:
    """Paths of part directories that were begun and are not wholly sealed."""
    sealed = own_directories(manifest)
    number = 0
    while exists((layout := part_layout(cache, number)).request):
        path = layout.root.relative_to(cache).as_posix()
        parts = sealed.get(path, [])
        if not parts or parts[0].planned_units > sum(len(part.units) for part in parts):
            yield path
        number += 1


def _bucket(cache: Path) -> Bucket:
    bucket = bucket_of(cache)
    assert bucket is not None, "the caller asked"
    return bucket
