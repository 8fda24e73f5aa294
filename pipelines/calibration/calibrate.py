"""Calibration, the step before capture: the teacher reads a sample and the plan is frozen.

It writes `statistics/` first and the plan last; a rerun that finds the plan obeys it. Calibration
is a Beam step, so that a driver without accelerators can start a capture.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from decant.models import ModelConfig
from decant.pipelines import config
from decant.pipelines.calibration import canary
from decant.pipelines.calibration.directions import KnownDirections, Moments
from decant.pipelines.calibration.signal_specs import describe_arrays, with_signal_id
from decant.pipelines.calibration.tail_prior import PriorSums
from decant.pipelines.teacher.batch_size import default_batch_rows, fitting_batch_rows
from decant.pipelines.teacher.loaded import Observer, loaded_teacher
from decant.pipelines.teacher.outputs import OutputSpec, RowOutput
from decant.pipelines.teacher.rows_done import rows_done
from decant.schemas import codecs
from decant.schemas.disk.identity import signal_id
from decant.schemas.disk.layout import LOGITS, PartLayout
from decant.schemas.manifest.plan import Plan, PlannedRows, PlannedTeacher, write_plan
from decant.schemas.manifest.statistics import save_statistics, table_arrays
from decant.schemas.reading.units import read_unit_rows
from decant.schemas.records.rows import Row
from decant.schemas.signals import ArraySignal, HiddenSignal, LogitsSignal
from decant.schemas.targets.targets import Targets, join_targets

_MOST_TOKENS = 256 << 10
_LEAST_TOKENS = 4096
"""Limits of the sample's size, which is 5% of the corpus between them."""


@dataclass(frozen=True)
class CalibrateJob:
    """Everything that calibrating a new part needs."""

    part: Path
    tokenizer: str
    rows: PlannedRows
    teacher: config.Teacher
    model: ModelConfig
    signals: config.Signals
    teacher_id: str
    vocabulary_size: int
    sequence_length: int
    on_error: str
    """Goes into the plan; see `Corpus.on_error`."""
    known: Mapping[str, KnownDirections] = field(default_factory=dict)
    """Directions to reuse, by signal name; other projected signals get their own."""


def calibrate(job: CalibrateJob) -> None:
    """Run the teacher on the sample, write the part's statistics and, last, its plan.

    ValueError if no sampled row gives finite targets.
    """
    arrays = describe_arrays(
        job.signals,
        job.model,
        teacher_id=job.teacher_id,
        length=job.sequence_length,
        unit_rows=job.rows.unit_rows,
    )
    moments = Moments(_layers_to_project(arrays, job.known))
    prior = PriorSums(k=job.signals.logits.k)
    spec = OutputSpec(job.signals.logits.target_spec())
    planned = plan_teacher(job, dataclasses.replace(spec, arrays=arrays))
    outputs = run_sample(job.part, job.rows, planned, spec, observers=(prior, moments))
    targets = {
        place: output.targets
        for place, output in outputs.items()
        if output.finite and output.targets is not None
    }
    if not targets:
        raise ValueError(
            f"{planned.model}: gave NaN on every one of {len(outputs)} calibration rows; the "
            f"checkpoint is damaged or {planned.dtype} is too narrow for it"
        )
    digests = _save_logits_statistics(job, list(targets.values()), prior)
    canaries = tuple(targets)[: canary.ROWS]
    canary_arrays = canary.canary_arrays([targets[place] for place in canaries])
    signals, directions = freeze_signals(
        arrays, moments, part=job.part, rows_id=job.rows.rows_id, known=job.known
    )
    plan = Plan(
        tokenizer=job.tokenizer,
        rows=job.rows,
        teacher=planned,
        signals={LOGITS: _describe_logits(job, digests), **signals},
        statistics=digests | directions | save_statistics(job.part, canary_arrays),
        canary=canaries,
        on_error=job.on_error,
    )
    write_plan(PartLayout(job.part).plan, plan)


@dataclass(frozen=True)
class AdditionJob:
    """Everything that planning more signals for a sealed part needs."""

    part: Path
    path: Path
    """Where the plan of the addition is written."""
    sealed: Plan
    """The part's own plan, with its units as the manifest has them."""
    arrays: Mapping[str, ArraySignal]
    """The signals to add, by name, from `describe_arrays`."""
    known: Mapping[str, KnownDirections] = field(default_factory=dict)
    """Directions to reuse, by signal name."""


def calibrate_addition(job: AdditionJob) -> None:
    """Write the plan of the signals that a sealed part gains.

    The teacher runs only if a new signal needs principal directions that no part has.
    """
    sealed, moments = job.sealed, Moments(_layers_to_project(job.arrays, job.known))
    if moments.layers:
        run_sample(job.part, sealed.rows, sealed.teacher, OutputSpec(), observers=(moments,))
    rows_id = sealed.rows.rows_id
    signals, directions = freeze_signals(
        job.arrays, moments, part=job.part, rows_id=rows_id, known=job.known
    )
    kept = sealed.statistics if sealed.canary else {}
    canaries = {n: sha for n, sha in kept.items() if canary.is_canary(n)}
    plan = dataclasses.replace(sealed, signals=signals, statistics=canaries | directions)
    write_plan(job.path, plan)


def run_sample(
    part: Path,
    rows: PlannedRows,
    planned: PlannedTeacher,
    spec: OutputSpec,
    *,
    observers: Sequence[Observer],
) -> dict[tuple[int, int], RowOutput]:
    """The teacher's outputs for the sampled rows, by (unit, offset)."""
    sample = sample_places(rows, length=planned.sequence_length)
    outputs = loaded_teacher(planned).run(
        _read_rows(part, rows, sample, length=planned.sequence_length), spec, observers=observers
    )
    read = {}
    for place, output in zip(sample, outputs, strict=True):
        read[place] = output
        rows_done.add(1)
    return read


def freeze_signals(
    arrays: Mapping[str, ArraySignal],
    moments: Moments,
    *,
    part: Path,
    rows_id: str,
    known: Mapping[str, KnownDirections],
) -> tuple[dict[str, ArraySignal], dict[str, str]]:
    """Write the directions of projected signals.

    Returns the signals with their signal_id, and the sha256 of each directions file. ValueError if
    the sample has too few tokens to find a signal's directions.
    """
    signals: dict[str, ArraySignal] = {}
    written: dict[str, str] = {}
    for name, signal in arrays.items():
        if not (isinstance(signal, HiddenSignal) and signal.width < signal.teacher_width):
            signals[name] = with_signal_id(signal, rows_id=rows_id)
            continue
        if name in known:
            directions, share = known[name].load(), known[name].variance_kept
        else:
            directions, share = _find_directions(signal, moments)
        digests = save_statistics(part, {f"hidden-{signal.layer}-directions": directions})
        ((file, sha256),) = digests.items()
        described = dataclasses.replace(signal, directions=file, variance_kept=share)
        signals[name] = with_signal_id(described, rows_id=rows_id, directions=sha256)
        written |= digests
    return signals, written


def _find_directions(signal: HiddenSignal, moments: Moments) -> tuple[np.ndarray, float]:
    if moments.tokens <= signal.width:
        raise ValueError(
            f"signals.hidden.width is {signal.width}, but the calibration sample gave only "
            f"{moments.tokens} finite tokens to find as many directions in; choose fewer"
        )
    return moments.directions(signal.layer, width=signal.width)


def _layers_to_project(
    arrays: Mapping[str, ArraySignal], known: Mapping[str, KnownDirections]
) -> list[int]:
    """Hidden layers whose states are projected onto directions that are not known yet."""
    return [
        signal.layer
        for name, signal in arrays.items()
        if isinstance(signal, HiddenSignal)
        and signal.width < signal.teacher_width
        and name not in known
    ]


def _save_logits_statistics(
    job: CalibrateJob, targets: list[Targets], prior: PriorSums
) -> dict[str, str]:
    """Write the codec's tables and the tail prior. Returns the sha256 of each file."""
    tables = codecs.fit(
        job.signals.logits.profile, join_targets(targets), vocabulary=job.vocabulary_size
    )
    arrays = table_arrays(tables)
    if result := prior.result():
        arrays |= result.arrays()
    return save_statistics(job.part, arrays)


def plan_teacher(job: CalibrateJob, spec: OutputSpec) -> PlannedTeacher:
    """The teacher with every shape decided, for this worker's devices.

    `spec` is everything that capture will compute: it decides the memory a batch takes. ValueError
    if not even one row a device fits into memory.
    """
    rows = job.teacher.batch_rows
    decided = rows if isinstance(rows, int) else None
    planned = PlannedTeacher(
        model=job.teacher.model,
        teacher_id=job.teacher_id,
        dtype=job.teacher.dtype,
        vocabulary_size=job.vocabulary_size,
        sequence_length=job.sequence_length,
        batch_rows=decided or default_batch_rows(job.sequence_length, mesh=job.teacher.mesh),
        mesh=job.teacher.mesh,
        quantize=job.teacher.quantize,
    )
    if rows == "auto" or (rows is None and jax.default_backend() != "cpu"):
        return dataclasses.replace(planned, batch_rows=fitting_batch_rows(planned, spec))
    return planned


def sample_places(rows: PlannedRows, *, length: int) -> tuple[tuple[int, int], ...]:
    """(unit, offset) of the rows to calibrate on: 5% of the corpus, 4k to 256k tokens.

    The rows with the smallest keys: a pseudo-random choice that does not depend on the order of
    files or on parallelism. `length` is the number of tokens in a row.
    """
    tokens = sum(unit.tokens for unit in rows.units)
    wanted = min(max(tokens // 20, _LEAST_TOKENS), _MOST_TOKENS)
    return ordered_places(rows)[: max(1, -(-wanted // length))]


def ordered_places(rows: PlannedRows) -> tuple[tuple[int, int], ...]:
    """(unit, offset) of the train rows with the smallest keys, in order of their keys.

    Of all rows if there are no train rows: a small new part may hold only held-out documents.
    """
    every = ((n, offset) for n, unit in enumerate(rows.units) for offset in range(unit.rows))
    return rows.sample or tuple(every)


def _describe_logits(job: CalibrateJob, digests: dict[str, str]) -> LogitsSignal:
    identity = signal_id(
        rows=job.rows.rows_id,
        teacher=job.teacher_id,
        settings=job.signals.logits.settings(),
        statistics=digests,
    )
    return LogitsSignal(
        signal_id=identity,
        teacher_id=job.teacher_id,
        profile=job.signals.logits.profile,
        **dataclasses.asdict(job.signals.logits.target_spec()),
    )


def _read_rows(
    part: Path, rows: PlannedRows, places: Sequence[tuple[int, int]], *, length: int
) -> list[Row]:
    return [
        read_unit_rows(part, unit, rows.units[unit], length=length, offsets=[offset])[0]
        for unit, offset in places
    ]


def read_canaries(part: Path, plan: Plan) -> list[Row]:
    """The canary rows, which each worker runs before its first unit."""
    return _read_rows(part, plan.rows, plan.canary, length=plan.teacher.sequence_length)
