"""Capturing one unit: its rows through the teacher into files, and its commits last.

A unit's files are functions of the plan alone, so doing one twice, or twice at once, leaves the
same bytes.
"""

import dataclasses
import platform
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

from decant.pipelines.calibration.calibrate import read_canaries
from decant.pipelines.calibration.canary import IDS, check_canary
from decant.pipelines.capture.progress import done_here
from decant.pipelines.teacher.inference import Asked, RowOutput, TeacherRunner, teacher_for
from decant.schemas.arrays.writer import ArrayWriter
from decant.schemas.codecs import Tables
from decant.schemas.disk import steps
from decant.schemas.disk.array_record import write_records
from decant.schemas.disk.layout import LOGITS, PartLayout
from decant.schemas.disk.steps import Step
from decant.schemas.manifest.commits import Commit, summarise_shards, valid_commit, write_commit
from decant.schemas.manifest.plan import Plan, read_plan
from decant.schemas.manifest.statistics import load_statistic, load_tables
from decant.schemas.reading.units import read_unit_rows
from decant.schemas.records.logits import encode_logits
from decant.schemas.records.rows import Row
from decant.schemas.signals import LogitsSignal, TargetSpec

_Stamp = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Worker:
    """What a process needs to capture units of one plan, made once and checked once."""

    part: Path
    plan: Plan
    teacher: TeacherRunner
    asked: Asked
    logits: LogitsSignal | None
    tables: Tables


_lock = threading.Lock()
_made: dict[tuple[Path, Path, _Stamp], Worker] = {}


def worker_for(part: Path, plan_path: Path) -> Worker:
    """This process's worker for the plan of `part` at `plan_path`; another plan's replaces it.

    RuntimeError if its canary rows differ from the plan's.
    """
    with _lock:
        key = part, plan_path, _stamp(plan_path)
        if key not in _made:
            _made.clear()
            _made[key] = _worker(part, plan_at(plan_path))
        return _made[key]


def forget_worker() -> None:
    """Let go of this process's worker, and so of its teacher."""
    with _lock:
        _made.clear()


def plan_at(path: Path) -> Plan:
    """The plan that is at `path` now. One of 10,000 units takes a tenth of a second to read."""
    return _plan_at(path, _stamp(path))


@lru_cache(maxsize=2)
def _plan_at(path: Path, stamp: _Stamp) -> Plan:
    return read_plan(path)


def _stamp(path: Path) -> _Stamp:
    """What differs as soon as the file is replaced."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _worker(part: Path, plan: Plan) -> Worker:
    teacher = teacher_for(plan.teacher)
    logits = plan.signals.get(LOGITS)
    assert logits is None or isinstance(logits, LogitsSignal)
    asked = Asked(logits.target_spec if logits else None, plan.arrays, _directions(part, plan))
    # Canaries are compared in their logits, whatever the plan captures.
    compared = asked if logits else dataclasses.replace(asked, targets=TargetSpec(IDS))
    if plan.canary:
        canaries = teacher.run(read_canaries(part, plan), compared)
        check_canary(plan, part, [output.targets for output in canaries if output.targets])
    tables = load_tables(part, plan.statistics)
    return Worker(part, plan, teacher, asked, logits, tables)


def capture_unit(number: int, part: Path, plan_path: Path) -> None:
    """Write what the plan holds of unit `number`, and its commits. Does nothing if they stand."""
    if is_committed(part, plan_at(plan_path), number):
        return
    worker = worker_for(part, plan_path)
    unit = worker.plan.rows.units[number]
    rows = read_unit_rows(part, number, unit)
    steps.reached(Step.UNIT_BEGUN)
    seen = _Seen(skipped=list(unit.skipped_rows))
    writers = _array_writers(worker, number)
    outputs = _stored(worker, number, rows, seen=seen)
    records = list(_records(worker, rows, outputs, writers=writers, seen=seen))
    shards = {
        signal: {name: writer.finish() for name, writer in of_signal.items()}
        for signal, of_signal in writers.items()
    }
    steps.reached(Step.UNIT_COMPUTED)
    layout, made_by = PartLayout(part), provenance()
    if worker.logits:
        file = write_records(layout.records(LOGITS, number), records, kind="logits")
        commit = Commit(
            number,
            worker.logits.signal_id,
            file,
            made_by,
            tuple(seen.skipped),
            seen.draws_near_edge,
        )
        write_commit(part, LOGITS, commit)
    for name, found in shards.items():
        identity = worker.plan.signals[name].signal_id
        file = summarise_shards(found, rows=unit.rows)
        skipped = tuple(seen.skipped)
        write_commit(part, name, Commit(number, identity, file, made_by, skipped, shards=found))
    steps.reached(Step.UNIT_COMMITTED)


def is_committed(part: Path, plan: Plan, number: int) -> bool:
    """Whether every signal of the plan has its commit of the unit."""
    return all(valid_commit(part, name, number) for name in plan.signals)


@dataclass
class _Seen:
    """What came up while a unit was captured."""

    skipped: list[int] = field(default_factory=list)
    """Offsets of rows left unscored for NaN, now or when another signal was captured."""
    draws_near_edge: int = 0


def _array_writers(worker: Worker, number: int) -> dict[str, dict[str, ArrayWriter]]:
    """Writers of the unit's arrays, by signal and array name."""
    plan, layout = worker.plan, PartLayout(worker.part)
    first = number * plan.rows.unit_rows
    return {
        signal: {
            name: ArrayWriter(layout.array(name), spec, first=first)
            for name, spec in plan.specs(signal).items()
        }
        for signal in plan.arrays
    }


def _stored(worker: Worker, number: int, rows: list[Row], *, seen: _Seen) -> Iterator[RowOutput]:
    """The teacher's outputs of the unit's rows, those with NaN marked and listed in `seen`.

    ValueError with their numbers after the last row, if the plan does not skip such rows.
    """
    plan, bad = worker.plan, []
    for offset, output in enumerate(worker.teacher.run(rows, worker.asked)):
        if offset in seen.skipped:
            output = dataclasses.replace(output, finite=False)
        elif not output.finite:
            bad.append(offset)
        seen.draws_near_edge += output.near_edge
        yield output
    if bad and plan.on_error == "fail":
        first = sum(unit.rows for unit in plan.rows.units[:number])
        raise ValueError(
            f"{plan.teacher.model}: gave NaN in rows {[first + offset for offset in bad]} "
            f"(unit {number}); nothing of this unit was committed. Try teacher.dtype = "
            '"float32", or set corpus.on_error = "skip" to leave such rows out.'
        )
    seen.skipped = sorted(seen.skipped + bad)


def _records(
    worker: Worker,
    rows: list[Row],
    outputs: Iterator[RowOutput],
    *,
    writers: Mapping[str, Mapping[str, ArrayWriter]],
    seen: _Seen,
) -> Iterator[bytes]:
    """One record of logits a row, if they are captured; the arrays' rows go to their writers."""
    for row, output in zip(rows, outputs, strict=True):
        for of_signal in writers.values():
            for name, writer in of_signal.items():
                stored = output.arrays[name]
                writer.append(stored if output.finite else np.zeros_like(stored))
        if worker.logits and output.targets is not None:
            scored, found = row.loss_mask, output.targets
            if not output.finite:
                scored, found = scored & False, found[:0]
            yield encode_logits(
                found,
                row_key=row.key,
                scored=scored,
                profile=worker.logits.profile,
                tables=worker.tables,
                vocabulary=worker.plan.teacher.vocabulary_size,
            )
        done_here.add(1)


def provenance() -> dict[str, str]:
    """What rounding may depend on. Equal provenance gives equal bytes."""
    device = jax.local_devices()[0]
    return {
        "jax": version("jax"),
        "device": device.device_kind,
        "devices": str(jax.local_device_count()),
        "machine": platform.machine(),
    }


def _directions(part: Path, plan: Plan) -> dict[str, np.ndarray]:
    """What each signal's states are projected onto, of those that are."""
    names = {name: getattr(signal, "directions", None) for name, signal in plan.arrays.items()}
    return {
        name: load_statistic(part, file, sha256=plan.statistics[file])
        for name, file in names.items()
        if file
    }
