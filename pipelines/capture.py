"""Capturing one unit: its rows through the teacher into records, and its commit last.

A unit's files are functions of the plan alone, so doing one twice, or twice at once, leaves the
same bytes.
"""

import dataclasses
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax

from pipelines.calibrate import read_canaries
from pipelines.canary import check_canary
from pipelines.progress import done_here
from pipelines.teacher import TeacherRunner, teacher_for
from pipelines.wanted import Wanted
from schemas.codecs import Tables
from schemas.files import FileEntry, read_json, require_file, write_json, write_records
from schemas.identity import file_sha256
from schemas.layout import PartLayout
from schemas.logits import encode_logits
from schemas.manifest import Unit
from schemas.plan import Plan, read_plan
from schemas.rows import Row
from schemas.statistics import load_tables
from schemas.units import read_unit_rows

SIGNAL = "logits"


@dataclass(frozen=True)
class Commit:
    """That a unit's signal is whole on disk; written when everything else of it is."""

    unit: int
    signal_id: str
    file: FileEntry
    skipped_rows: tuple[int, ...]
    draws_near_edge: int
    """Draws that other rounding may turn into a neighbouring token; see schemas.draws."""
    provenance: dict[str, str]


@dataclass(frozen=True)
class Worker:
    """What a process needs to capture units of one part, made once and checked once."""

    part: Path
    plan: Plan
    teacher: TeacherRunner
    tables: Tables


@cache
def worker_for(part: Path, plan_sha256: str) -> Worker:
    """This process's worker for `part`, whose plan file has this hash.

    RuntimeError if its canary rows differ from the plan's.
    """
    plan = read_plan(PartLayout(part).plan)
    teacher = teacher_for(plan.teacher, Wanted.of(plan.signals[SIGNAL]))
    canaries = [result.targets for result in teacher.run(read_canaries(part, plan))]
    check_canary(plan, part, canaries)
    return Worker(part, plan, teacher, load_tables(part, plan.statistics))


def capture_unit(number: int, part: Path) -> None:
    """Write unit `number`'s logits and commit. Does nothing if a commit stands."""
    if read_commit(part, number) is not None:
        return
    worker = worker_for(part, file_sha256(PartLayout(part).plan))
    unit = worker.plan.rows.units[number]
    rows = read_unit_rows(part, number, unit)
    seen = _Seen()
    records = list(_records(worker, number, rows, seen=seen))
    layout = PartLayout(part)
    entry = write_records(layout.records(SIGNAL, number), records)
    signal = worker.plan.signals[SIGNAL]
    commit = Commit(
        number, signal.signal_id, entry, tuple(seen.skipped), seen.draws_near_edge, provenance()
    )
    write_json(layout.commit(SIGNAL, number), dataclasses.asdict(commit))


@dataclass
class _Seen:
    """What came up while a unit's records were made."""

    skipped: list[int] = field(default_factory=list)
    """Offsets of rows left unscored for NaN."""
    draws_near_edge: int = 0


def _records(worker: Worker, number: int, rows: list[Row], *, seen: _Seen) -> Iterator[bytes]:
    """One record a row; what an operator should know goes to `seen`."""
    plan = worker.plan
    bad = []
    for offset, (row, result) in enumerate(zip(rows, worker.teacher.run(rows), strict=True)):
        scored, found = row.loss_mask, result.targets
        if not result.finite:
            bad.append(offset)
            scored, found = scored & False, found[:0]
        seen.draws_near_edge += result.near_edge
        yield encode_logits(
            found,
            row_key=row.key,
            scored=scored,
            profile=plan.signals[SIGNAL].profile,
            tables=worker.tables,
            vocabulary=plan.teacher.vocabulary_size,
        )
        done_here.add(1)
    if bad and plan.on_error == "fail":
        first = sum(unit.rows for unit in plan.rows.units[:number])
        raise ValueError(
            f"{plan.teacher.model}: gave NaN in rows {[first + offset for offset in bad]} "
            f"(unit {number}); nothing of this unit was committed. Try teacher.dtype = "
            '"float32", or set corpus.on_error = "skip" to leave such rows out.'
        )
    seen.skipped.extend(bad)


def read_commit(part: Path, number: int) -> Commit | None:
    """The commit of a unit, if it stands: whole, with its file as it was committed."""
    path = PartLayout(part).commit(SIGNAL, number)
    if not path.exists():
        return None
    try:
        value = read_json(path)
        file = FileEntry(**value["file"])
        require_file(PartLayout(part).records(SIGNAL, number), file)
    except ValueError:
        return None  # damaged after it was written: captured again
    skipped = tuple(value["skipped_rows"])
    return Commit(**{**value, "file": file, "skipped_rows": skipped})


def committed(unit: Unit, commit: Commit) -> Unit:
    """The unit with its signal's file."""
    files = {**unit.files, SIGNAL: commit.file}
    return dataclasses.replace(unit, files=files, skipped_rows=commit.skipped_rows)


def provenance() -> dict[str, str]:
    """What rounding may depend on. Equal provenance gives equal bytes."""
    device = jax.local_devices()[0]
    return {
        "jax": version("jax"),
        "device": device.device_kind,
        "devices": str(jax.local_device_count()),
        "machine": platform.machine(),
    }
