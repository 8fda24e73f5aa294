"""The plan of an aligned part: codec tables of a sample of its targets, and its origin."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from decant.pipelines.alignment.rows import Other, aligner_for
from decant.pipelines.alignment.rows_step import RowsWritten
from decant.pipelines.alignment.targets import RowTargets, TargetMaker
from decant.pipelines.calibration.companions import freeze_counts
from decant.pipelines.calibration.heads import LogitsRecords
from decant.pipelines.calibration.sample import sample_tokens
from decant.schemas import codecs
from decant.schemas.disk.identity import signal_id
from decant.schemas.disk.layout import COUNTS, LOGITS, PartLayout
from decant.schemas.disk.stand_in import Travels
from decant.schemas.manifest.manifest import Aligned
from decant.schemas.manifest.plan import Plan, PlannedRows, read_plan, write_plan
from decant.schemas.manifest.statistics import MATCHED, save_statistics, table_arrays
from decant.schemas.records.logits import encode_logits
from decant.schemas.signals import CountsSignal, LogitsSignal, Signal
from decant.schemas.targets.targets import Targets, join_targets

_UNITS = 4
"""Units of the sample: all rows of a unit are made again for one of them."""


@dataclass(frozen=True)
class PlanJob(Travels):
    """Everything that planning needs."""

    part: Path
    other: Other
    made: RowsWritten
    logits: LogitsSignal
    """The signal without its signal_id."""
    draws: int
    """N of the counts; 0 for none."""
    tokenizer: str
    aligned: Aligned
    """Without the units that were left out."""
    aligned_with: str


def make_plan(job: PlanJob) -> None:
    """Write the part's statistics and, last, its plan. ValueError if nothing has a target."""
    aligner = aligner_for(job.other)
    rows, size = job.made.rows, aligner.student.size
    aligned = dataclasses.replace(job.aligned, left_out=job.made.left_out)
    maker = TargetMaker(aligner, logits=job.logits, draws=job.draws)
    sample = [one for one in _sample(job, maker, aligned) if len(one.targets)]
    if not sample:
        raise ValueError(
            f"{aligner.cache.address}: no sampled position has a target: the two tokenizers hardly "
            "ever begin a token at the same byte"
        )
    vocabulary = size + job.logits.unmatched
    full = _full(join_targets([one.targets for one in sample]), vocabulary=vocabulary)
    mass = None if job.logits.mass == 1 else job.logits.mass
    tables = codecs.fit(job.logits.profile, full, vocabulary=vocabulary, mass=mass)
    arrays = table_arrays(tables)
    if job.logits.unmatched:
        partners = np.zeros(size, np.uint8)
        partners[aligner.partners[aligner.partners >= 0]] = 1
        arrays[MATCHED.removesuffix(".npy")] = partners
    digests = save_statistics(job.part, arrays)
    logits = _identified(job.logits, rows_id=rows.rows_id, digests=digests)
    signals: dict[str, Signal] = {LOGITS: logits}
    if job.draws:
        records = LogitsRecords(logits, tables, vocabulary)
        signals[COUNTS], more = freeze_counts(
            CountsSignal("", logits.teacher_id, job.draws),
            [one.counts for one in sample if one.counts is not None],
            [_head(records, one, length=aligner.length) for one in sample],
            part=job.part,
            rows_id=rows.rows_id,
            vocabulary=size,
        )
        digests |= more
    first = aligner.cache.manifest.parts[0]
    teacher = read_plan(aligner.cache.plan_path(first)).teacher
    plan = Plan(
        tokenizer=job.tokenizer,
        rows=rows,
        teacher=dataclasses.replace(teacher, vocabulary_size=size, sequence_length=aligner.length),
        signals=signals,
        statistics=digests,
        canary=(),
        on_error="fail",
        aligned=aligned,
        aligned_with=job.aligned_with,
    )
    write_plan(PartLayout(job.part).plan, plan, first=True)


def other_unit(number: int, aligned: Aligned) -> int:
    """Number of the other cache's unit that gave unit `number`."""
    for left_out in aligned.left_out:
        number += left_out <= number
    return number


def _sample(job: PlanJob, maker: TargetMaker, aligned: Aligned) -> list[RowTargets]:
    """Targets of some rows of the units whose rows have the smallest keys."""
    rows, aligner = job.made.rows, aligner_for(job.other)
    wanted = -(-sample_tokens(sum(unit.tokens for unit in rows.units)) // aligner.length)
    units = list(dict.fromkeys(unit for unit, _ in _places(rows)))[:_UNITS]
    made: list[RowTargets] = []
    for unit in units:
        some = aligner.rows(other_unit(unit, aligned))
        some.sort(key=lambda one: one.row.key)
        made += maker.of_rows(some[: max(1, -(-wanted // len(units)))])
    return made


def _places(rows: PlannedRows) -> Sequence[tuple[int, int]]:
    return rows.sample or [(number, 0) for number in range(len(rows.units))]


def _full(targets: Targets, *, vocabulary: int) -> Targets:
    """Those with k ids; if there are none, all, with other ids of probability 0 behind their own.

    Tables are fitted to heads of one size.
    """
    if targets.sizes is None or not targets.k:
        return targets
    whole = targets.sizes == targets.k
    if whole.any():
        return dataclasses.replace(targets[whole], sizes=None)
    ids = targets.ids.copy()
    for row, size in enumerate(targets.sizes.tolist()):
        unused = np.setdiff1d(np.arange(2 * targets.k), ids[row, :size])
        ids[row, size:] = unused[: targets.k - size] % vocabulary
    return dataclasses.replace(targets, ids=ids, sizes=None)


def _head(records: LogitsRecords, one: RowTargets, *, length: int) -> Targets:
    return records.decode(encode_head(records, one), length=length)


def encode_head(records: LogitsRecords, one: RowTargets) -> bytes:
    """The logits record of an aligned row, which has targets where `taught`."""
    return encode_logits(
        one.targets,
        row_key=one.row.key,
        scored=one.taught,
        profile=records.signal.profile,
        tables=records.tables,
        vocabulary=records.vocabulary,
        mass=records.signal.mass,
    )


def _identified(signal: LogitsSignal, *, rows_id: str, digests: dict[str, str]) -> LogitsSignal:
    settings = {name: value for name, value in vars(signal).items() if name != "signal_id"}
    identity = signal_id(
        rows=rows_id,
        teacher=signal.teacher_id,
        settings={**settings, "betas": list(signal.betas), "draw_betas": list(signal.draw_betas)},
        statistics=digests,
    )
    return dataclasses.replace(signal, signal_id=identity)
