"""One Beam step before capture: the teacher runs on a planned sample and freezes the tables.

It runs on a worker so that a driver without accelerators can start a capture. What it finds goes
to `statistics/` and the plan, written last; a rerun finds the plan and obeys it.
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
from decant.pipelines.calibration.directions import Moments
from decant.pipelines.calibration.signal_specs import describe, named
from decant.pipelines.calibration.tail_prior import PriorSums
from decant.pipelines.teacher.batch_size import default_batch_rows, fitting_batch_rows
from decant.pipelines.teacher.inference import Asked, Observer, RowOutput, teacher_for
from decant.schemas import codecs
from decant.schemas.disk.identity import signal_id
from decant.schemas.disk.layout import LOGITS, PartLayout
from decant.schemas.manifest.plan import Plan, PlannedRows, PlannedTeacher, write_plan
from decant.schemas.manifest.statistics import load_statistic, save_statistics, table_arrays
from decant.schemas.reading.units import read_unit_rows
from decant.schemas.records.rows import Row
from decant.schemas.signals import ArraySignal, HiddenSignal, LogitsSignal, Signal
from decant.schemas.targets.targets import Targets, join_targets

_MOST_TOKENS = 256 << 10
_LEAST_TOKENS = 4096


@dataclass(frozen=True)
class Known:
    """Directions that an older part's states are projected onto: so are those of all parts, or
    nobody could learn from them together."""

    part: Path
    file: str
    """Among the part's statistics."""
    sha256: str
    variance_kept: float
    """On the older part's sample."""


def known_directions(
    cache: Path, signals: Mapping[str, Signal], statistics: Mapping[str, str], *, path: str
) -> dict[str, Known]:
    """By signal, those of the part at `path` below the cache."""
    return {
        name: Known(
            (cache / path).absolute(), s.directions, statistics[s.directions], s.variance_kept
        )
        for name, s in signals.items()
        if isinstance(s, HiddenSignal) and s.directions
    }


@dataclass(frozen=True)
class CalibrateJob:
    """Everything calibration needs: the rows, and what was asked for."""

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
    known: Mapping[str, Known] = field(default_factory=dict)
    """Of an older part, by signal."""


def calibrate(job: CalibrateJob) -> None:
    """Run the teacher on the sample and write the part's statistics and, last, its plan.

    ValueError when no sampled row gives finite targets.
    """
    arrays = describe(
        job.signals,
        job.model,
        teacher_id=job.teacher_id,
        length=job.sequence_length,
        unit_rows=job.rows.unit_rows,
    )
    moments, prior = Moments(_projected(arrays, job.known)), PriorSums(k=job.signals.logits.k)
    asked = Asked(job.signals.logits.target_spec())
    planned = plan_teacher(job, dataclasses.replace(asked, arrays=arrays))
    outputs = run_sample(job.part, job.rows, planned, asked, observers=(prior, moments))
    found = {
        place: output.targets
        for place, output in outputs.items()
        if output.finite and output.targets is not None
    }
    if not found:
        raise ValueError(
            f"{planned.model}: gave NaN on every one of {len(outputs)} calibration rows; the "
            f"checkpoint is damaged or {planned.dtype} is too narrow for it"
        )
    digests = _save_logits_statistics(job, list(found.values()), prior)
    canaries = tuple(found)[: canary.ROWS]
    canary_targets = canary.canary_arrays([found[place] for place in canaries])
    signals, directions = frozen(
        arrays, moments, part=job.part, rows_id=job.rows.rows_id, known=job.known
    )
    plan = Plan(
        tokenizer=job.tokenizer,
        rows=job.rows,
        teacher=planned,
        signals={LOGITS: _describe_logits(job, digests), **signals},
        statistics=digests | directions | save_statistics(job.part, canary_targets),
        canary=canaries,
        on_error=job.on_error,
    )
    write_plan(PartLayout(job.part).plan, plan)


@dataclass(frozen=True)
class AddJob:
    """Everything that planning more signals of a sealed part needs."""

    part: Path
    path: Path
    """Where the plan goes."""
    sealed: Plan
    """The part's own plan, with the units as they were sealed."""
    arrays: Mapping[str, ArraySignal]
    """What is added, as `describe` gives it."""
    known: Mapping[str, Known] = field(default_factory=dict)
    """Of an older part, by signal."""


def calibrate_addition(job: AddJob) -> None:
    """Write the plan of signals that a sealed part gains; the teacher runs if they need it to."""
    sealed, moments = job.sealed, Moments(_projected(job.arrays, job.known))
    if moments.layers:
        run_sample(job.part, sealed.rows, sealed.teacher, Asked(), observers=(moments,))
    rows_id = sealed.rows.rows_id
    signals, directions = frozen(
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
    asked: Asked,
    *,
    observers: Sequence[Observer],
) -> dict[tuple[int, int], RowOutput]:
    """What the teacher gives for the sampled rows, by (unit, offset)."""
    sample = sample_places(rows, length=planned.sequence_length)
    outputs = teacher_for(planned).run(_read_places(part, rows, sample), asked, observers=observers)
    return dict(zip(sample, outputs, strict=True))


def frozen(
    arrays: Mapping[str, ArraySignal],
    moments: Moments,
    *,
    part: Path,
    rows_id: str,
    known: Mapping[str, Known],
) -> tuple[dict[str, ArraySignal], dict[str, str]]:
    """The signals with their identities, and sha256 of the directions written for them.

    ValueError if the sample has too few tokens for as many directions.
    """
    signals: dict[str, ArraySignal] = {}
    written: dict[str, str] = {}
    for name, signal in arrays.items():
        if not (isinstance(signal, HiddenSignal) and signal.width < signal.teacher_width):
            signals[name] = named(signal, rows_id=rows_id)
            continue
        if name in known:
            directions, share = _loaded(known[name]), known[name].variance_kept
        else:
            directions, share = _found(signal, moments)
        digests = save_statistics(part, {f"hidden-{signal.layer}-directions": directions})
        ((file, sha256),) = digests.items()
        described = dataclasses.replace(signal, directions=file, variance_kept=share)
        signals[name] = named(described, rows_id=rows_id, directions=sha256)
        written |= digests
    return signals, written


def _loaded(known: Known) -> np.ndarray:
    return load_statistic(known.part, known.file, sha256=known.sha256)


def _found(signal: HiddenSignal, moments: Moments) -> tuple[np.ndarray, float]:
    if moments.tokens <= signal.width:
        raise ValueError(
            f"signals.hidden.width is {signal.width}, but the calibration sample gave only "
            f"{moments.tokens} finite tokens to find as many directions in; choose fewer"
        )
    return moments.directions(signal.layer, width=signal.width)


def _projected(arrays: Mapping[str, ArraySignal], known: Mapping[str, Known]) -> list[int]:
    """Hidden layers of which the leading directions alone are kept and must be found."""
    return [
        signal.layer
        for name, signal in arrays.items()
        if isinstance(signal, HiddenSignal)
        and signal.width < signal.teacher_width
        and name not in known
    ]


def _save_logits_statistics(
    job: CalibrateJob, found: list[Targets], prior: PriorSums
) -> dict[str, str]:
    """Write the codec's tables and the tail prior; sha256 by file."""
    tables = codecs.fit(
        job.signals.logits.profile, join_targets(found), vocabulary=job.vocabulary_size
    )
    arrays = table_arrays(tables)
    if result := prior.result():
        arrays |= result.arrays()
    return save_statistics(job.part, arrays)


def plan_teacher(job: CalibrateJob, asked: Asked) -> PlannedTeacher:
    """The teacher with every shape decided, on the devices of this worker, for what capture asks.

    ValueError if not even one row a device fits into memory.
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
        return dataclasses.replace(planned, batch_rows=fitting_batch_rows(planned, asked))
    return planned


def sample_places(rows: PlannedRows, *, length: int) -> tuple[tuple[int, int], ...]:
    """(unit, offset) of the sampled rows: the smallest keys, so a pseudo-random choice that
    neither order nor parallelism changes. 5% of the corpus within 4k and 256k tokens."""
    tokens = sum(unit.tokens for unit in rows.units)
    wanted = min(max(tokens // 20, _LEAST_TOKENS), _MOST_TOKENS)
    # A part that grew by little may hold nothing but held-out documents: then those.
    every = ((n, offset) for n, unit in enumerate(rows.units) for offset in range(unit.rows))
    return (rows.sample or tuple(every))[: max(1, -(-wanted // length))]


def _describe_logits(job: CalibrateJob, digests: dict[str, str]) -> LogitsSignal:
    identity = signal_id(
        rows=job.rows.rows_id,
        teacher=job.teacher_id,
        settings=job.signals.logits.settings(),
        statistics=digests,
    )
    spec = job.signals.logits.target_spec()
    return LogitsSignal(
        signal_id=identity,
        teacher_id=job.teacher_id,
        profile=job.signals.logits.profile,
        **dataclasses.asdict(spec),
    )


def _read_places(part: Path, rows: PlannedRows, places: Sequence[tuple[int, int]]) -> list[Row]:
    return [
        read_unit_rows(part, unit, rows.units[unit], offsets=[offset])[0] for unit, offset in places
    ]


def read_canaries(part: Path, plan: Plan) -> list[Row]:
    """The rows that a worker re-runs before its first unit."""
    return _read_places(part, plan.rows, plan.canary)
