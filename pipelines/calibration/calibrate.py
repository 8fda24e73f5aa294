"""Calibration, the step before capture: the teacher reads a sample and the plan is frozen.

It writes `statistics/` first and the plan last; a rerun that finds the plan obeys it. Calibration
is a Beam step, so that a driver without accelerators can start a capture.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax

from decant.models import ModelConfig
from decant.pipelines import config
from decant.pipelines.calibration import canary
from decant.pipelines.calibration.heads import LogitsRecords, sealed_heads
from decant.pipelines.calibration.known import Known
from decant.pipelines.calibration.sample import Place, Sample, read_rows
from decant.pipelines.calibration.signal_specs import AddedSignal, describe_signals
from decant.pipelines.calibration.tail_prior import PriorSums
from decant.pipelines.teacher.batch_size import default_batch_rows, fitting_batch_rows
from decant.pipelines.teacher.outputs import OutputSpec
from decant.schemas import codecs
from decant.schemas.codecs import Tables
from decant.schemas.disk.identity import signal_id
from decant.schemas.disk.layout import LOGITS, PartLayout
from decant.schemas.disk.stand_in import Travels
from decant.schemas.manifest.plan import Plan, PlannedRows, PlannedTeacher, write_plan
from decant.schemas.manifest.statistics import save_statistics, table_arrays, table_hashes
from decant.schemas.records.rows import Row
from decant.schemas.signals import ArraySignal, LogitsSignal
from decant.schemas.targets.targets import Targets, cut_to_k, join_targets


@dataclass(frozen=True)
class CalibrateJob(Travels):
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
    known: Known = field(default_factory=dict)
    """What is reused of older parts; other signals get directions and a basis of their own."""


def calibrate(job: CalibrateJob) -> None:
    """Run the teacher on the sample, write the part's statistics and, last, its plan.

    ValueError if no sampled row gives finite targets.
    """
    described = describe_signals(
        job.signals,
        job.model,
        teacher_id=job.teacher_id,
        length=job.sequence_length,
        unit_rows=job.rows.unit_rows,
    )
    asked = job.signals.logits.target_spec()
    sample = Sample(job.part, job.rows, described, k=asked.k, known=job.known)
    spec = OutputSpec(canary.comparable(asked))
    prior = PriorSums(k=asked.k) if asked.k else None
    planned = plan_teacher(job, _output_spec(spec, described, draws=sample.draws))
    read = sample.run(planned, spec, observers=[prior] if prior else [])
    targets = {at: output.targets for at, (_, output) in read.items() if output.targets is not None}
    if not targets:
        raise ValueError(
            f"{planned.model}: gave NaN on every calibration row; the checkpoint is damaged or "
            f"{planned.dtype} is too narrow for it"
        )
    stored = {at: cut_to_k(of_row, asked.k) for at, of_row in targets.items()}
    tables, digests = _save_logits_statistics(job, list(stored.values()), prior)
    logits = _describe_logits(job, digests)
    records = LogitsRecords(logits, tables, job.vocabulary_size)

    def head_at(place: Place) -> Targets:
        row, _ = read[place]
        return records.decode(records.encode(row, stored[place]), length=job.sequence_length)

    signals, others = sample.freeze(head_at, vocabulary=job.vocabulary_size)
    canaries = tuple(targets)[: canary.ROWS]
    canary_arrays = canary.canary_arrays([targets[place] for place in canaries])
    plan = Plan(
        tokenizer=job.tokenizer,
        rows=job.rows,
        teacher=planned,
        signals={LOGITS: logits, **signals},
        statistics=digests | others | save_statistics(job.part, canary_arrays),
        canary=canaries,
        on_error=job.on_error,
    )
    write_plan(PartLayout(job.part).plan, plan, first=True)


def _output_spec(spec: OutputSpec, described: Mapping[str, AddedSignal], *, draws: int):
    """All that capture will compute, as far as it takes memory."""
    arrays = {n: s for n, s in described.items() if isinstance(s, ArraySignal)}
    return dataclasses.replace(spec, arrays=arrays, counts=draws)


@dataclass(frozen=True)
class AdditionJob(Travels):
    """Everything that planning more signals for a sealed part needs."""

    part: Path
    path: Path
    """Where the plan of the addition is written."""
    sealed: Plan
    """The part's own plan, with its units as the manifest has them."""
    signals: Mapping[str, AddedSignal]
    """The signals to add, by name, from `describe_signals`."""
    known: Known = field(default_factory=dict)
    """What is reused of other parts, by signal name."""


def calibrate_addition(job: AdditionJob) -> None:
    """Write the plan of the signals that a sealed part gains.

    The teacher runs only if a new signal has statistics that must be found on the sample.
    """
    sealed = job.sealed
    stored = sealed.signals.get(LOGITS)
    k = stored.k if isinstance(stored, LogitsSignal) else 0
    sample = Sample(job.part, sealed.rows, job.signals, k=k, known=job.known)
    if sample.needs_teacher:
        sample.run(sealed.teacher, OutputSpec())

    def head_at(place: Place) -> Targets:
        unit, offset = place
        (head,) = sealed_heads(sealed, job.part, unit, [offset])
        return head

    signals, written = sample.freeze(head_at, vocabulary=sealed.teacher.vocabulary_size)
    kept = sealed.statistics if sealed.canary else {}
    canaries = {n: sha for n, sha in kept.items() if canary.is_canary(n)}
    plan = dataclasses.replace(sealed, signals=signals, statistics=canaries | written)
    if sample.draws:
        logits = sealed.signals[LOGITS]
        assert isinstance(logits, LogitsSignal)
        tables = table_hashes(sealed.statistics)
        plan = dataclasses.replace(plan, coded_with=logits, statistics=plan.statistics | tables)
    write_plan(job.path, plan, first=True)


def _save_logits_statistics(
    job: CalibrateJob, targets: list[Targets], prior: PriorSums | None
) -> tuple[Tables, dict[str, str]]:
    """Write the codec's tables and the tail prior; the tables, and the sha256 of each file."""
    logits = job.signals.logits
    tables = codecs.fit(
        logits.profile,
        join_targets(targets),
        vocabulary=job.vocabulary_size,
        mass=logits.mass,
    )
    arrays = table_arrays(tables)
    if prior and (result := prior.result()):
        arrays |= result.arrays()
    return tables, save_statistics(job.part, arrays)


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


def _describe_logits(job: CalibrateJob, digests: dict[str, str]) -> LogitsSignal:
    identity = signal_id(
        rows=job.rows.rows_id,
        teacher=job.teacher_id,
        settings={**job.signals.logits.settings(), "labels": True},
        statistics=digests,
    )
    return LogitsSignal(
        signal_id=identity,
        teacher_id=job.teacher_id,
        profile=job.signals.logits.profile,
        **dataclasses.asdict(job.signals.logits.target_spec()),
    )


def read_canaries(part: Path, plan: Plan) -> list[Row]:
    """The canary rows, which each worker runs before its first unit."""
    return read_rows(part, plan.rows.units, plan.canary, length=plan.teacher.sequence_length)
