"""Sealed caches with wrong contents: change records, then rewrite commits and manifest to match."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

from decant.schemas import Cache, open_cache
from decant.schemas.disk.array_record import RecordReaders, write_records
from decant.schemas.disk.layout import LOGITS, PartLayout
from decant.schemas.manifest.commits import load_commit, write_commit
from decant.schemas.manifest.manifest import read_manifest, write_manifest
from decant.schemas.manifest.statistics import load_tables
from decant.schemas.records.logits import decode_logits, encode_logits, open_logits
from decant.schemas.targets.targets import Targets


def copy_of(cache: Cache, to: Path) -> Path:
    """Copy the cache to directory `to`."""
    shutil.copytree(cache.path, to)
    return to


def with_records(path: Path, units: dict[int, list[bytes]], *, signal: str = LOGITS) -> Cache:
    """The cache at `path` with records of a signal replaced, by unit number."""
    manifest = read_manifest(path)
    (part,) = manifest.parts
    layout, sealed = PartLayout(path / part.path), list(part.units)
    for number, records in units.items():
        entry = write_records(layout.records(signal, number), records)
        commit = load_commit(layout.commit(signal, number))
        write_commit(layout.root, signal, dataclasses.replace(commit, file=entry))
        files = {**sealed[number].files, signal: entry}
        sealed[number] = dataclasses.replace(sealed[number], files=files)
    part = dataclasses.replace(part, units=tuple(sealed))
    new = dataclasses.replace(manifest, parts=(part,))
    write_manifest(path, new, replaces=manifest.cache_id)
    return open_cache(path)


def records_of(path: Path, number: int, *, signal: str = LOGITS) -> list[bytes]:
    """The records of a signal in unit `number`."""
    (part,) = read_manifest(path).parts
    entry = part.units[number].files[signal]
    file = PartLayout(path / part.path).records(signal, number)
    return RecordReaders().read(file, range(entry.records), expected=entry)


def with_targets(path: Path, change: Callable[[Targets], Targets]) -> Cache:
    """The cache at `path` with `change` applied to the targets of every row."""
    manifest = read_manifest(path)
    (part,) = manifest.parts
    tables = load_tables(path / part.path, part.statistics, vocabulary=manifest.vocabulary_size)
    size, profile = manifest.vocabulary_size, manifest.logits.profile

    def changed(record: bytes) -> bytes:
        opened = open_logits(record, where="", length=manifest.sequence_length, spec=part.logits)
        return encode_logits(
            change(decode_logits([opened], tables=tables, vocabulary=size)),
            row_key=opened.row_key,
            scored=opened.scored,
            profile=profile,
            tables=tables,
            vocabulary=size,
        )

    units = range(len(part.units))
    return with_records(path, {n: [changed(r) for r in records_of(path, n)] for n in units})
