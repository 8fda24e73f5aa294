"""A large cache without a large capture: a sealed cache's rows, again and again."""

import dataclasses
import shutil
from itertools import cycle, islice
from pathlib import Path

from decant.schemas import Cache, open_cache
from decant.schemas.disk.array_record import RecordReaders, write_records
from decant.schemas.disk.layout import ROWS, TOKENIZER, PartLayout
from decant.schemas.manifest.commits import load_commit, write_commit
from decant.schemas.manifest.manifest import Unit, write_manifest


def stretched(cache: Cache, output: Path, *, units: int, rows: int) -> Cache:
    """A cache at `output` of `units` train units of `rows` rows each: those of `cache`, repeated.

    Its records are in the same codecs, and its files are named and checked like any other's. The
    first part's plan and statistics are its own too. Signals in arrays are left out.
    """
    part = cache.manifest.parts[0]
    here, there = PartLayout(cache.path / part.path), PartLayout(output / part.path)
    kept = [name for name in part.signals if "/" not in name]
    records = {name: _records(cache, here, name) for name in (ROWS, *kept)}
    shutil.copytree(cache.path / TOKENIZER, output / TOKENIZER)
    shutil.copytree(here.statistics, there.statistics)
    for file in (here.plan, here.request):
        shutil.copy(file, there.root / file.name)
    made = []
    for number in range(units):
        chosen = {
            name: list(islice(cycle(all_of), number * rows, (number + 1) * rows))
            for name, all_of in records.items()
        }
        files = {name: write_records(there.records(name, number), c) for name, c in chosen.items()}
        for name in kept:
            commit = load_commit(here.commit(name, part.unit_numbers[0]))
            write_commit(
                there.root,
                name,
                dataclasses.replace(commit, unit=number, file=files[name], skipped_rows=()),
            )
        made.append(Unit("train", rows, rows * cache.manifest.sequence_length, 0, files))
    whole = dataclasses.replace(
        part,
        units=tuple(made),
        unit_rows=rows,
        numbers=(),
        planned_units=0,
        signals={name: part.signals[name] for name in kept},
    )
    write_manifest(output, dataclasses.replace(cache.manifest, parts=(whole,)), replaces=None)
    return open_cache(output)


def _records(cache: Cache, layout: PartLayout, name: str) -> list[bytes]:
    """All records of the first part of a signal, or its rows."""
    readers = RecordReaders()
    return [
        record
        for number, unit in cache.manifest.parts[0].numbered_units
        for record in readers.read(
            layout.records(name, number), range(unit.rows), expected=unit.files[name]
        )
    ]
