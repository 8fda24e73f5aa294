"""One unit in a worker: its rows go through the teacher into files; its commits are written last.

The files depend on the plan alone: capturing a unit twice, even at the same time, leaves the same
bytes.
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
from decant.pipelines.teacher.loaded import LoadedTeacher, loaded_teacher
from decant.pipelines.teacher.outputs import OutputSpec, RowOutput
from decant.pipelines.teacher.rows_done import rows_done
from decant.schemas.arrays.writer import ArrayWriter
from decant.schemas.codecs import Tables
from decant.schemas.disk import steps
from decant.schemas.disk.array_record import write_records
from decant.schemas.disk.layout import LOGITS, PartLayout
from decant.schemas.disk.locks import capturing
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
    """What a process needs to capture units of one plan. Made once, checked by canary rows."""

    part: Path
    plan: Plan
    teacher: LoadedTeacher
    spec: OutputSpec
    logits: LogitsSignal | None
    tables: Tables


_lock = threading.Lock()
_made: dict[tuple[Path, Path, _Stamp], Worker] = {}


def worker_for(part: Path, plan_path: Path) -> Worker:
    """This process's worker for the plan file of `part`. It replaces the worker of another plan.

    RuntimeError if the teacher gives other targets for the canary rows than the plan has.
    """
    with _lock:
        key = part, plan_path, _stamp(plan_path)
        if key not in _made:
            _made.clear()
            _made[key] = _make_worker(part, current_plan(plan_path))
        return _made[key]


def forget_worker() -> None:
    """Drop this process's worker, and with it its reference to the teacher."""
    with _lock:
        _made.clear()


def current_plan(path: Path) -> Plan:
    """The plan that the file holds now.

    Cached, because reading a plan of 10,000 units takes a tenth of a second.
    """
    return _cached_plan(path, _stamp(path))


@lru_cache(maxsize=2)
def _cached_plan(path: Path, stamp: _Stamp) -> Plan:
    return read_plan(path)


def _stamp(path: Path) -> _Stamp:
    """Inode, modification time and size: one of them changes when the file is replaced."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _make_worker(part: Path, plan: Plan) -> Worker:
    teacher = loaded_teacher(plan.teacher)
    logits = plan.signals.get(LOGITS)
    assert logits is None or isinstance(logits, LogitsSignal)
    spec = OutputSpec(
        logits.target_spec if logits else None, plan.arrays, _load_directions(part, plan)
    )
    # Canary rows are compared by their logits, also if the plan captures none.
    compared = spec if logits else dataclasses.replace(spec, targets=TargetSpec(IDS))
    if plan.canary:
        canaries = teacher.run(read_canaries(part, plan), compared)
        check_canary(plan, part, [output.targets for output in canaries if output.targets])
    tables = load_tables(part, plan.statistics, vocabulary=plan.teacher.vocabulary_size)
    return Worker(part, plan, teacher, spec, logits, tables)


def capture_unit(number: int, part: Path, plan_path: Path) -> None:
    """Write the files of unit `number` for every signal of the plan, then its commits.

    Does nothing if all commits are there. ValueError if a row gives NaN and the plan does not skip
    such rows; RuntimeError from `worker_for`.
    """
    # Also here, because a worker may outlive the command that started it.
    with capturing(part):
        if not is_committed(part, current_plan(plan_path), number):
            _capture_unit(number, part, plan_path)


def _capture_unit(number: int, part: Path, plan_path: Path) -> None:
    worker = worker_for(part, plan_path)
    unit = worker.plan.rows.units[number]
    length = worker.plan.teacher.sequence_length
    rows = read_unit_rows(part, number, unit, length=length)
    steps.reached(Step.UNIT_BEGUN)
    tally = _Tally(skipped=list(unit.skipped_rows))
    writers = _array_writers(worker, number)
    outputs = _run_teacher(worker, number, rows, tally=tally)
    records = list(_encode(worker, rows, outputs, writers=writers))
    shards_by_signal = {
        signal: {name: writer.finish() for name, writer in of_signal.items()}
        for signal, of_signal in writers.items()
    }
    steps.reached(Step.UNIT_COMPUTED)
    layout, made_by, skipped = PartLayout(part), provenance(), tuple(tally.skipped)
    if worker.logits:
        file = write_records(layout.records(LOGITS, number), records, kind="logits")
        commit = Commit(
            number,
            worker.logits.signal_id,
            file,
            made_by,
            skipped,
            tally.draws_near_edge,
        )
        write_commit(part, LOGITS, commit)
    for name, shards in shards_by_signal.items():
        signal_id = worker.plan.signals[name].signal_id
        file = summarise_shards(shards, rows=unit.rows)
        commit = Commit(number, signal_id, file, made_by, skipped, shards=shards)
        write_commit(part, name, commit)
    steps.reached(Step.UNIT_COMMITTED)


def is_committed(part: Path, plan: Plan, number: int) -> bool:
    """Whether the unit has a commit for every signal of the plan."""
    return all(valid_commit(part, name, number) for name in plan.signals)


@dataclass
class _Tally:
    """Counts of one unit, complete after its last row; they go into its commits."""

    skipped: list[int] = field(default_factory=list)
    """Offsets of rows that are stored unscored, for NaN in this capture or an earlier one."""
    draws_near_edge: int = 0
    """Draws that another rounding might change; see `RowOutput.near_edge`."""


def _array_writers(worker: Worker, number: int) -> dict[str, dict[str, ArrayWriter]]:
    """Writers of the unit's arrays, by signal name, then by array name."""
    plan, layout = worker.plan, PartLayout(worker.part)
    first = number * plan.rows.unit_rows
    return {
        signal: {
            name: ArrayWriter(layout.array(name), spec, first=first)
            for name, spec in plan.specs(signal).items()
        }
        for signal in plan.arrays
    }


def _run_teacher(
    worker: Worker, number: int, rows: list[Row], *, tally: _Tally
) -> Iterator[RowOutput]:
    """The teacher's outputs for the unit's rows; adds rows with NaN and draw counts to `tally`.

    A row that an earlier capture skipped comes out as not finite. After the last row, ValueError
    with the numbers of rows that gave NaN, if the plan does not skip such rows.
    """
    plan, bad = worker.plan, []
    for offset, output in enumerate(worker.teacher.run(rows, worker.spec)):
        if offset in tally.skipped:
            output = dataclasses.replace(output, finite=False)
        elif not output.finite:
            bad.append(offset)
        tally.draws_near_edge += output.near_edge
        yield output
    if bad and plan.on_error == "fail":
        first = sum(unit.rows for unit in plan.rows.units[:number])
        raise ValueError(
            f"{plan.teacher.model}: gave NaN in rows {[first + offset for offset in bad]} "
            f"(unit {number}); nothing of this unit was committed. Try teacher.dtype = "
            '"float32", or set corpus.on_error = "skip" to leave such rows out.'
        )
    tally.skipped = sorted(tally.skipped + bad)


def _encode(
    worker: Worker,
    rows: list[Row],
    outputs: Iterator[RowOutput],
    *,
    writers: Mapping[str, Mapping[str, ArrayWriter]],
) -> Iterator[bytes]:
    """Append each row's arrays to their writers; yield its logits record, if logits are captured.

    A row that is not finite is stored as zeros, and its record without targets.
    """
    for row, output in zip(rows, outputs, strict=True):
        for of_signal in writers.values():
            for name, writer in of_signal.items():
                array = output.arrays[name]
                writer.append(array if output.finite else np.zeros_like(array))
        if worker.logits and output.targets is not None:
            scored, targets = row.loss_mask, output.targets
            if not output.finite:
                scored, targets = scored & False, targets[:0]
            yield encode_logits(
                targets,
                row_key=row.key,
                scored=scored,
                profile=worker.logits.profile,
                tables=worker.tables,
                vocabulary=worker.plan.teacher.vocabulary_size,
            )
        rows_done.add(1, part=worker.part)


def provenance() -> dict[str, str]:
    """What rounding may depend on: jax's version and the devices. Equal values give equal bytes."""
    device = jax.local_devices()[0]
    return {
        "jax": version("jax"),
        "device": device.device_kind,
        "devices": str(jax.local_device_count()),
        "machine": platform.machine(),
    }


def _load_directions(part: Path, plan: Plan) -> dict[str, np.ndarray]:
    """The directions of each projected signal, float32 [D, width], by signal name."""
    names = {name: getattr(signal, "directions", None) for name, signal in plan.arrays.items()}
    return {
        name: load_statistic(part, file, sha256=plan.statistics[file])
        for name, file in names.items()
        if file
    }
