"""One Beam step before capture: the teacher runs on a planned sample and freezes the tables.

It runs on a worker so that a driver without accelerators can start a capture. What it finds goes
to `statistics/` and `plan.json`, written last; a rerun finds the plan and obeys it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines import canary, config
from pipelines.teacher import PriorSums, default_batch_rows, teacher_for
from schemas import codecs
from schemas.identity import signal_id
from schemas.layout import PartLayout
from schemas.plan import Plan, PlannedRows, PlannedTeacher, write_plan
from schemas.rows import Row
from schemas.signals import LogitsSignal
from schemas.statistics import save_statistics, table_arrays
from schemas.targets import joined
from schemas.units import read_unit_rows

_MOST_TOKENS = 256 << 10
_LEAST_TOKENS = 4096


@dataclass(frozen=True)
class CalibrateJob:
    """Everything calibration needs: the rows, and what was asked for."""

    part: Path
    tokenizer: str
    rows: PlannedRows
    teacher: config.Teacher
    logits: config.Logits
    teacher_id: str
    vocabulary_size: int
    sequence_length: int
    on_error: str


def calibrate(job: CalibrateJob) -> None:
    """Run the teacher on the sample and write the part's statistics and, last, its plan.

    ValueError when no sampled row gives finite targets.
    """
    planned = plan_teacher(job)
    sample = sample_places(job.rows, length=job.sequence_length)
    wanted = job.logits.wanted()
    teacher = teacher_for(planned, wanted)
    prior = PriorSums()
    results = teacher.run(_read_places(job.part, job.rows, sample), prior=prior)
    found = {
        place: result.targets
        for place, result in zip(sample, results, strict=True)
        if result.finite
    }
    if not found:
        raise ValueError(
            f"{planned.model}: gave NaN on every one of {len(sample)} calibration rows; the "
            f"checkpoint is damaged or {planned.dtype} is too narrow for it"
        )
    tables = codecs.fit(
        job.logits.profile, joined(list(found.values())), vocabulary=job.vocabulary_size
    )
    frozen = table_arrays(tables)
    if result := prior.result():
        frozen |= result.arrays()
    digests = save_statistics(job.part, frozen)
    canaries = tuple(found)[: canary.ROWS]
    canary_targets = canary.canary_arrays([found[place] for place in canaries])
    plan = Plan(
        tokenizer=job.tokenizer,
        rows=job.rows,
        teacher=planned,
        signals={"logits": _describe(job, digests)},
        statistics=digests | save_statistics(job.part, canary_targets),
        canary=canaries,
        on_error=job.on_error,
    )
    write_plan(PartLayout(job.part).plan, plan)


def plan_teacher(job: CalibrateJob) -> PlannedTeacher:
    """The teacher with every shape decided, on the devices of this worker."""
    return PlannedTeacher(
        model=job.teacher.model,
        teacher_id=job.teacher_id,
        dtype=job.teacher.dtype,
        vocabulary_size=job.vocabulary_size,
        sequence_length=job.sequence_length,
        batch_rows=job.teacher.batch_rows or default_batch_rows(job.sequence_length),
        tensor_parallel=job.teacher.tensor_parallel,
    )


def sample_places(rows: PlannedRows, *, length: int) -> tuple[tuple[int, int], ...]:
    """(unit, offset) of the sampled rows: the smallest keys, so a pseudo-random choice that
    neither order nor parallelism changes. 5% of the corpus within 4k and 256k tokens."""
    tokens = sum(unit.tokens for unit in rows.units)
    wanted = min(max(tokens // 20, _LEAST_TOKENS), _MOST_TOKENS)
    return rows.sample[: max(1, -(-wanted // length))]


def _describe(job: CalibrateJob, digests: dict[str, str]) -> LogitsSignal:
    identity = signal_id(
        rows=job.rows.rows_id,
        teacher=job.teacher_id,
        settings=job.logits.settings(),
        statistics=digests,
    )
    wanted = job.logits.wanted()
    return LogitsSignal(
        identity,
        job.teacher_id,
        profile=job.logits.profile,
        **dataclasses.asdict(wanted),
    )


def _read_places(part: Path, rows: PlannedRows, places: Sequence[tuple[int, int]]) -> list[Row]:
    return [
        read_unit_rows(part, unit, rows.units[unit], offsets=[offset])[0] for unit, offset in places
    ]


def read_canaries(part: Path, plan: Plan) -> list[Row]:
    """The rows that a worker re-runs before its first unit."""
    return _read_places(part, plan.rows, plan.canary)
