"""The Beam step that writes the rows: a unit of the other cache gives one unit of the same split.

Only unit numbers pass through Beam. A unit that gives no row is left out, so units are numbered
when all are there.
"""

import contextlib
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam

from decant.pipelines.alignment.rows import Other, aligner_for
from decant.pipelines.rows.shard import SAMPLE_ROWS
from decant.pipelines.runners.run_pipeline import Build
from decant.pipelines.teacher.rows_done import rows_done
from decant.schemas.disk import inside, steps
from decant.schemas.disk.array_record import as_json, write_records
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.disk.layout import ROWS, PartLayout, cache_of, unit_name
from decant.schemas.disk.stand_in import Travels, each_of, exists
from decant.schemas.disk.steps import Step
from decant.schemas.manifest.manifest import Unit, unit_from_json
from decant.schemas.manifest.plan import PlannedRows, planned_rows_from_json
from decant.schemas.records.rows import encode_row


class RowsWritten(NamedTuple):
    """The rows of all units, and numbers of the other cache's units that gave none."""

    rows: PlannedRows
    left_out: tuple[int, ...]
    beside: int
    """Scored positions for which no teacher's position speaks."""


@dataclass(frozen=True)
class RowsJob(Travels):
    """What a worker needs to write the rows of a unit."""

    part: Path
    other: Other

    def commit(self, unit: int) -> Path:
        """Says what the unit of this number of the other cache gave."""
        return PartLayout(self.part).work / f"rows-{unit:05d}.json"

    def staged(self, unit: int) -> Path:
        """The unit's rows before they get their final name."""
        return PartLayout(self.part).work / f"rows-{unit:05d}" / f"{unit_name(unit)}.array_record"


def write_rows(job: RowsJob, *, rows_id: str, run: Callable[[Build], None]) -> RowsWritten:
    """Write the rows of all units, but of those that an earlier run has written, and number them.

    ValueError if no unit gives a row.
    """
    work = PartLayout(job.part).work / "rows.json"
    if not exists(work):
        units = range(len(aligner_for(job.other).cache.units()))
        there = each_of(exists, [job.commit(n) for n in units], cache=job.part)
        todo = [n for n, done in zip(units, there, strict=True) if not done]
        if todo:
            run(
                lambda pipeline: (
                    pipeline
                    | beam.Create(todo)
                    | beam.Reshuffle()
                    | "Align rows" >> beam.Map(write_unit_rows, job)
                )
            )
        made = _numbered(job, rows_id=rows_id, units=len(units))
        value = {"rows": as_json(made.rows), "left_out": list(made.left_out), "beside": made.beside}
        steps.reached(Step.ROWS_GATHERED)
        write_json(work, value, first=True)
    value = read_json(work, holds="rows")
    rows = planned_rows_from_json(value["rows"])
    return RowsWritten(rows, tuple(value["left_out"]), value["beside"])


def write_unit_rows(number: int, job: RowsJob) -> None:
    """Write the rows of unit `number` of the other cache and, last, what they are."""
    if exists(job.commit(number)):
        return
    aligner = aligner_for(job.other)
    _, unit, numbers = aligner.cache.units()[number]
    aligned = aligner.rows(number)
    described: dict[str, Any] = {"unit": None, "sample": [], "beside": 0}
    if aligned:
        rows = [one.row for one in aligned]
        entry = write_records(job.staged(number), [encode_row(row) for row in rows], kind="rows")
        scored = int(sum(row.loss_mask.sum() for row in rows))
        new = Unit(
            unit.split,
            rows=len(rows),
            tokens=int(sum((row.segment_ids > 0).sum() for row in rows)),
            scored=scored,
            files={ROWS: entry},
            group=unit.group,
        )
        keys = ((row.key.hex(), offset) for offset, row in enumerate(rows))
        described = {
            "unit": as_json(new),
            "sample": heapq.nsmallest(SAMPLE_ROWS, keys) if unit.split == "train" else [],
            "beside": scored - int(sum((one.source >= 0).sum() for one in aligned)),
        }
    write_json(job.commit(number), described, kind="shard", first=True)
    rows_done.add(len(numbers), part=job.part)


def _numbered(job: RowsJob, *, rows_id: str, units: int) -> RowsWritten:
    """Number the units that have rows and give their files their names. May be called again."""
    layout, aligner = PartLayout(job.part), aligner_for(job.other)
    manifest = aligner.cache.manifest
    made: list[Unit] = []
    left_out: list[int] = []
    sample: list[tuple[str, int, int]] = []
    beside = 0
    commits = each_of(read_json, [job.commit(n) for n in range(units)], cache=job.part)
    for number, commit in enumerate(commits):
        if commit["unit"] is None:
            left_out.append(number)
            continue
        staged, final = job.staged(number), layout.records(ROWS, len(made))
        root = cache_of(final) or job.part
        # Missing if an earlier run has moved it; in a bucket, rows have the name of their content.
        with contextlib.suppress(FileNotFoundError):
            inside.move(root, staged.relative_to(root), final.relative_to(root))
        sample += [(key, len(made), offset) for key, offset in commit["sample"]]
        made.append(unit_from_json(commit["unit"]))
        beside += commit["beside"]
    if not any(unit.scored for unit in made):
        raise ValueError(f"{aligner.cache.address}: gives no row in the other tokenizer's tokens")
    largest = max(unit.rows for unit in made)
    rows = PlannedRows(
        rows_id=rows_id,
        unit_rows=1 << (largest - 1).bit_length(),
        units=tuple(made),
        sources=aligner.sources,
        skipped=tuple(s for part in manifest.parts for s in part.skipped),
        duplicates=sum(part.duplicates for part in manifest.parts),
        sample=tuple((unit, offset) for _, unit, offset in sorted(sample)[:SAMPLE_ROWS]),
        unwritten=_added(part.unwritten for part in manifest.parts),
        weights=manifest.source_weights,
    )
    return RowsWritten(rows, tuple(left_out), beside)


def _added(counts) -> dict[str, int]:
    total: dict[str, int] = {}
    for some in counts:
        for name, count in some.items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items()))
