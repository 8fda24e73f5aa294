"""Adds counts and a sketch to a sealed cache, from targets that a test makes up."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from decant.schemas import Cache, open_cache
from decant.schemas.codecs import Tables, counts_field
from decant.schemas.disk.array_record import RecordReaders, write_records
from decant.schemas.disk.layout import COUNTS, LOGITS, SKETCH, PartLayout
from decant.schemas.manifest.commits import Commit, load_commit, write_commit
from decant.schemas.manifest.manifest import Part, read_manifest, write_manifest
from decant.schemas.manifest.statistics import load_tables, save_statistics, table_arrays
from decant.schemas.records.companion import encode_counts, encode_sketch
from decant.schemas.records.logits import decode_logits, open_logits
from decant.schemas.signals import CountsSignal, SketchSignal
from decant.schemas.targets import sketch as sketches
from decant.schemas.targets.counts import Counts, count_draws
from decant.schemas.targets.sketch import SketchHead
from decant.schemas.targets.targets import Targets, join_targets

DRAWS, RANK = 8, 3
ID = "ab" * 32


def drawn(head: Targets, *, vocabulary: int, draws: int = DRAWS) -> Counts:
    """Counts that follow from `head`: half of the draws are its ids, the others pseudo-random."""
    ids = head.ids.astype(np.int64)
    if not ids.shape[1]:
        ids = np.arange(len(head))[:, None]
    numbers = np.arange(draws)
    of_head = ids[:, (numbers * numbers) % ids.shape[1] // 2]
    others = (ids[:, :1] * 31 + 17 * numbers * numbers) % vocabulary
    return count_draws(np.where(numbers % 2 == 0, of_head, others).astype(np.int32))


def sketched(head: Targets) -> np.ndarray:
    """Sketches float32 [n, RANK] that follow from `head`."""
    return np.sin(head.logprobs[:, :1] * [[1.0, 2.0, 3.0]]).astype(np.float32)


def sketch_statistics(vocabulary: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Statistics of a part with a sketch, with pseudo-random numbers."""
    random = np.random.default_rng(seed)
    head = SketchHead(
        random.normal(size=(RANK, vocabulary)).astype(np.float32),
        random.normal(size=vocabulary).astype(np.float32),
    )
    return {
        sketches.MEAN: np.zeros(32, np.float32),
        sketches.PROJECTION: np.zeros((32, RANK), np.float32),
        sketches.HEAD: head.head.astype(np.float16),
        sketches.BIAS: head.bias,
        sketches.DEVIATIONS: np.array([3.0, 2.0, 1.0]),
    }


def with_companions(
    path: Path,
    *,
    signals: Collection[str] = (COUNTS, SKETCH),
    seeds: Callable[[int], int] = lambda part: 0,
    draws: Callable[[int], int] = lambda part: DRAWS,
    skipped: Collection[tuple[int, int]] = (),
) -> Cache:
    """The cache at `path`, with these signals added to each part.

    `seeds` gives the seed of a part's sketch head by the part's number, `draws` its N. Rows
    `skipped`, as (unit, offset) of the first part, get records without positions.
    """
    manifest = read_manifest(path)
    parts = []
    for number, part in enumerate(manifest.parts):
        gone = skipped if number == 0 else ()
        parts.append(
            _with_companions(
                path, part, signals, seed=seeds(number), draws=draws(number), skipped=gone
            )
        )
    new = dataclasses.replace(manifest, parts=tuple(parts))
    write_manifest(path, new, replaces=manifest.cache_id)
    return open_cache(path)


def _with_companions(
    path: Path,
    part: Part,
    signals: Collection[str],
    *,
    seed: int,
    draws: int,
    skipped: Collection[tuple[int, int]],
) -> Part:
    manifest, root = read_manifest(path), path / part.path
    size, length = manifest.vocabulary_size, manifest.sequence_length
    tables = load_tables(root, part.statistics, vocabulary=size)
    layout = PartLayout(root)
    heads: dict[int, list[Targets]] = {}
    keys: dict[int, list[bytes]] = {}
    for number, unit in part.numbered_units:
        file, entry = layout.records(LOGITS, number), unit.files[LOGITS]
        records = [
            open_logits(data, where="", length=length, spec=part.logits)
            for data in RecordReaders().read(file, range(unit.rows), expected=entry)
        ]
        keys[number] = [record.row_key for record in records]
        heads[number] = [
            decode_logits([record], tables=tables, vocabulary=size)[
                slice(0, 0) if (number, offset) in skipped else slice(None)
            ]
            for offset, record in enumerate(records)
        ]
    arrays, described = {}, dict(part.signals)
    made: dict[str, dict[int, list[bytes]]] = {}
    if COUNTS in signals:
        everything = join_targets([head for of_unit in heads.values() for head in of_unit])
        sample = drawn(everything, vocabulary=size, draws=draws)
        own = counts_field.fit(sample, head=everything, vocabulary=size)
        arrays |= table_arrays(own, signal=COUNTS)
        described[COUNTS] = CountsSignal(ID, part.logits.teacher_id, draws)
        made[COUNTS] = {
            number: [
                encode_counts(
                    drawn(head, vocabulary=size, draws=draws),
                    row_key=key,
                    head=head,
                    tables=own,
                    vocabulary=size,
                )
                for key, head in zip(keys[number], heads[number], strict=True)
            ]
            for number in heads
        }
    if SKETCH in signals:
        arrays |= sketch_statistics(size, seed=seed)
        signal = SketchSignal(ID, part.logits.teacher_id, RANK, 32, 0.0, False)
        described[SKETCH] = signal
        made[SKETCH] = {
            number: [
                encode_sketch(
                    sketched(head),
                    row_key=key,
                    signal=signal,
                    deviations=arrays[sketches.DEVIATIONS],
                    tables=Tables({}),
                )
                for key, head in zip(keys[number], heads[number], strict=True)
            ]
            for number in heads
        }
    statistics = part.statistics | save_statistics(root, arrays)
    units = []
    for number, unit in part.numbered_units:
        offsets = tuple(sorted(offset for of, offset in skipped if of == number))
        files = dict(unit.files)
        for name in signals:
            files[name] = write_records(layout.records(name, number), made[name][number])
            provenance = load_commit(layout.commit(LOGITS, number)).provenance
            commit = Commit(number, ID, files[name], provenance, offsets)
            write_commit(root, name, commit)
        missing = tuple(sorted({*unit.skipped_rows, *offsets}))
        units.append(dataclasses.replace(unit, files=files, skipped_rows=missing))
    return dataclasses.replace(part, units=tuple(units), signals=described, statistics=statistics)
