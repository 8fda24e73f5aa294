"""One unit in a worker: its rows go through the teacher into files; its commits are written last.

The files depend on the plan alone: capturing a unit twice, even at the same time, leaves the same
bytes.
"""

import dataclasses
import platform
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

from decant.pipelines.calibration.calibrate import read_canaries
from decant.pipelines.calibration.canary import check_canary, comparable
from decant.pipelines.calibration.heads import LogitsRecords, records_of, sealed_heads
from decant.pipelines.teacher.loaded import LoadedTeacher, loaded_teacher
from decant.pipelines.teacher.outputs import OutputSpec, Projection, RowOutput
from decant.pipelines.teacher.rows_done import rows_done
from decant.schemas.arrays.writer import ArrayWriter
from decant.schemas.codecs import Tables
from decant.schemas.disk import steps
from decant.schemas.disk.array_record import write_records
from decant.schemas.disk.layout import COUNTS, LOGITS, RECORDS, SKETCH, PartLayout
from decant.schemas.disk.locks import capturing
from decant.schemas.disk.stand_in import version_of
from decant.schemas.disk.steps import Step
from decant.schemas.manifest.commits import Commit, summarise_shards, valid_commit, write_commits
from decant.schemas.manifest.plan import Plan, read_plan
from decant.schemas.manifest.statistics import load_statistic, load_tables
from decant.schemas.reading.units import read_unit_rows
from decant.schemas.records.companion import encode_counts, encode_sketch
from decant.schemas.records.rows import Row
from decant.schemas.signals import CountsSignal, LogitsSignal, SketchSignal
from decant.schemas.targets.sketch import DEVIATIONS, MEAN, PROJECTION
from decant.schemas.targets.targets import Targets


@dataclass(frozen=True, eq=False)
class Worker:
    """What a process needs to capture units of one plan. Made once, checked by canary rows."""

    part: Path
    plan: Plan
    teacher: LoadedTeacher
    spec: OutputSpec
    logits: LogitsRecords | None
    """The logits records that the plan captures, or that its counts are coded with."""
    tables: Mapping[str, Tables]
    """Codec tables of `counts` and `sketch`, by signal."""
    deviations: np.ndarray | None
    """Standard deviations of sketches, float64 [rank]; None if the plan captures none."""

    @property
    def records(self) -> list[str]:
        """Names of the plan's signals that are stored in records, in the order of encoding."""
        return [name for name in RECORDS if name in self.plan.signals]


_lock = threading.Lock()
_made: dict[tuple[Path, Path, str], Worker] = {}


def worker_for(part: Path, plan_path: Path) -> Worker:
    """This process's worker for the plan file of `part`. It replaces the worker of another plan.

    RuntimeError if the teacher gives other targets for the canary rows than the plan has.
    """
    with _lock:
        key = part, plan_path, version_of(plan_path)
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
    return _cached_plan(path, version_of(path))


@lru_cache(maxsize=2)
def _cached_plan(path: Path, version: str) -> Plan:
    return read_plan(path)


def _make_worker(part: Path, plan: Plan) -> Worker:
    teacher = loaded_teacher(plan.teacher)
    spec = _output_spec(part, plan, teacher)
    # Canary rows are compared by their logits, also if the plan captures none.
    compared = dataclasses.replace(spec, targets=comparable(spec.targets))
    if plan.canary:
        with teacher.run(read_canaries(part, plan), compared) as canaries:
            targets = [output.targets for output in canaries if output.targets]
        check_canary(plan, part, targets)
    vocabulary = plan.teacher.vocabulary_size
    tables = {
        name: load_tables(part, plan.statistics, vocabulary=vocabulary, signal=name)
        for name in (COUNTS, SKETCH)
        if name in plan.signals
    }
    deviations = _statistic(part, plan, DEVIATIONS) if spec.sketch else None
    return Worker(part, plan, teacher, spec, records_of(plan, part), tables, deviations)


def _output_spec(part: Path, plan: Plan, teacher: LoadedTeacher) -> OutputSpec:
    """What the teacher has to compute for the signals of the plan."""
    logits, counts = plan.signals.get(LOGITS), plan.signals.get(COUNTS)
    projection = None
    if SKETCH in plan.signals:
        arrays = (_statistic(part, plan, name) for name in (MEAN, PROJECTION))
        projection = Projection(*map(teacher.replicated, arrays))
    return OutputSpec(
        logits.target_spec if isinstance(logits, LogitsSignal) else None,
        plan.arrays,
        _load_directions(part, plan),
        counts=counts.draws if isinstance(counts, CountsSignal) else 0,
        sketch=projection,
    )


def _statistic(part: Path, plan: Plan, name: str) -> np.ndarray:
    file = f"{name}.npy"
    return load_statistic(part, file, sha256=plan.statistics[file])


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
    with worker.teacher.run(rows, worker.spec) as outputs:
        checked = _checked(outputs, worker, number, tally=tally)
        records = _encode(worker, number, rows, checked, writers=writers)
    shards_by_signal = {
        signal: {name: writer.finish() for name, writer in of_signal.items()}
        for signal, of_signal in writers.items()
    }
    steps.reached(Step.UNIT_COMPUTED)
    layout, made_by, skipped = PartLayout(part), provenance(), tuple(tally.skipped)
    commits: dict[str, Commit] = {}
    for name in worker.records:
        file = write_records(layout.records(name, number), records[name], kind="logits")
        signal_id = worker.plan.signals[name].signal_id
        near = tally.draws_near_edge.get(name, 0)
        commits[name] = Commit(number, signal_id, file, made_by, skipped, near)
    for name, shards in shards_by_signal.items():
        signal_id = worker.plan.signals[name].signal_id
        file = summarise_shards(shards, rows=unit.rows)
        commits[name] = Commit(number, signal_id, file, made_by, skipped, shards=shards)
    write_commits(part, commits)
    steps.reached(Step.UNIT_COMMITTED)


def is_committed(part: Path, plan: Plan, number: int) -> bool:
    """Whether the unit has a commit for every signal of the plan."""
    return all(valid_commit(part, name, number) for name in plan.signals)


@dataclass
class _Tally:
    """Counts of one unit, complete after its last row; they go into its commits."""

    skipped: list[int] = field(default_factory=list)
    """Offsets of rows that are stored unscored, for NaN in this capture or an earlier one."""
    draws_near_edge: Counter[str] = field(default_factory=Counter)
    """By signal: draws that another rounding might change; see `RowOutput.near_edge`."""


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


def _checked(
    outputs: Iterable[RowOutput], worker: Worker, number: int, *, tally: _Tally
) -> Iterator[RowOutput]:
    """The teacher's outputs for the unit's rows; adds rows with NaN and draw counts to `tally`.

    A row that an earlier capture skipped comes out as not finite. After the last row, ValueError
    with the numbers of rows that gave NaN, if the plan does not skip such rows.
    """
    plan, bad = worker.plan, []
    for offset, output in enumerate(outputs):
        if offset in tally.skipped:
            output = dataclasses.replace(output, finite=False)
        elif not output.finite:
            bad.append(offset)
        tally.draws_near_edge.update({LOGITS: output.near_edge, COUNTS: output.counts_near_edge})
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
    number: int,
    rows: list[Row],
    outputs: Iterator[RowOutput],
    *,
    writers: Mapping[str, Mapping[str, ArrayWriter]],
) -> dict[str, list[bytes]]:
    """Append each row's arrays to their writers; the rows' records of each signal stored in them.

    A row that is not finite is stored as zeros, and its records without targets.
    """
    records: dict[str, list[bytes]] = {name: [] for name in worker.records}
    heads: list[Targets] = []
    if COUNTS in records and LOGITS not in records:
        heads = sealed_heads(worker.plan, worker.part, number, list(range(len(rows))))
    for offset, (row, output) in enumerate(zip(rows, outputs, strict=True)):
        for of_signal in writers.values():
            for name, writer in of_signal.items():
                array = output.arrays[name]
                writer.append(array if output.finite else np.zeros_like(array))
        if LOGITS in records:
            assert worker.logits
            assert output.targets is not None
            record = worker.logits.encode(row, output.targets, finite=output.finite)
            records[LOGITS].append(record)
            if COUNTS in records:
                heads.append(worker.logits.decode(record, length=len(row.tokens)))
        if COUNTS in records:
            records[COUNTS].append(_encode_counts(worker, row, output, heads[offset]))
        if SKETCH in records:
            records[SKETCH].append(_encode_sketch(worker, row, output))
        rows_done.add(1, part=worker.part)
    return records


def _encode_counts(worker: Worker, row: Row, output: RowOutput, head: Targets) -> bytes:
    assert output.counts is not None
    return encode_counts(
        output.counts if output.finite else output.counts[:0],
        row_key=row.key,
        head=head,
        tables=worker.tables[COUNTS],
        vocabulary=worker.plan.teacher.vocabulary_size,
    )


def _encode_sketch(worker: Worker, row: Row, output: RowOutput) -> bytes:
    signal = worker.plan.signals[SKETCH]
    assert isinstance(signal, SketchSignal)
    assert output.sketch is not None
    assert worker.deviations is not None
    return encode_sketch(
        output.sketch if output.finite else output.sketch[:0],
        row_key=row.key,
        signal=signal,
        deviations=worker.deviations,
        tables=worker.tables[SKETCH],
    )


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
