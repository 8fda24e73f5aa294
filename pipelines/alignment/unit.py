"""One unit in a worker: its rows are aligned again, their targets made and written, then commits.

The files depend on the plan alone, as those of a capture do.
"""

import threading
from pathlib import Path

import apache_beam as beam

from decant.pipelines.alignment.planning import encode_head, other_unit
from decant.pipelines.alignment.rows import AlignedRow, Aligner, Other, aligner_for
from decant.pipelines.alignment.targets import TargetMaker
from decant.pipelines.calibration.heads import LogitsRecords, records_of
from decant.pipelines.capture.unit import current_plan, is_committed, provenance
from decant.pipelines.teacher.rows_done import rows_done
from decant.schemas.disk import steps
from decant.schemas.disk.array_record import write_records
from decant.schemas.disk.layout import COUNTS, LOGITS, PartLayout
from decant.schemas.disk.locks import capturing
from decant.schemas.disk.stand_in import Travels, version_of
from decant.schemas.disk.steps import Step
from decant.schemas.manifest.commits import Commit, write_commits
from decant.schemas.manifest.plan import Plan
from decant.schemas.manifest.statistics import load_tables
from decant.schemas.reading.units import read_unit_rows
from decant.schemas.records.companion import encode_counts
from decant.schemas.signals import CountsSignal, LogitsSignal

_lock = threading.Lock()
_makers: dict[tuple, TargetMaker] = {}


class AlignUnits(Travels, beam.DoFn):
    """Makes the targets of the units whose numbers it gets, of `part`, by the plan at `plan`."""

    def __init__(self, part: Path, plan: Path, other: Other):
        self._part, self._plan, self._other = part, plan, other

    def process(self, number: int) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make a unit's targets."""
        align_unit(number, self._part, self._plan, self._other)


def align_unit(number: int, part: Path, plan_path: Path, other: Other) -> None:
    """Write the files of unit `number`, then its commits; nothing if all commits are there.

    RuntimeError if the text gives other tokens than when the rows were written.
    """
    with capturing(part):
        plan = current_plan(plan_path)
        if not is_committed(part, plan, number):
            key = (part, plan_path, version_of(plan_path))
            _align_unit(number, part, plan, aligner_for(other), key=key)


def _align_unit(number: int, part: Path, plan: Plan, aligner: Aligner, *, key: tuple) -> None:
    steps.reached(Step.UNIT_BEGUN)
    rows = _same_rows(number, part, plan, aligner)
    records = records_of(plan, part)
    assert records
    encoded = _encoded(rows, part, plan, records, _maker(aligner, plan, key=key))
    steps.reached(Step.UNIT_COMPUTED)
    layout, made_by = PartLayout(part), provenance()
    commits = {}
    for name, of_signal in encoded.items():
        file = write_records(layout.records(name, number), of_signal, kind="logits")
        commits[name] = Commit(number, plan.signals[name].signal_id, file, made_by)
    write_commits(part, commits)
    steps.reached(Step.UNIT_COMMITTED)


def _same_rows(number: int, part: Path, plan: Plan, aligner: Aligner) -> list[AlignedRow]:
    assert plan.aligned
    unit, length = plan.rows.units[number], plan.teacher.sequence_length
    written = read_unit_rows(part, number, unit, length=length)
    rows = aligner.rows(other_unit(number, plan.aligned))
    if [one.row.key for one in rows] != [row.key for row in written]:
        raise RuntimeError(
            f"{PartLayout(part).root}: unit {number} has other tokens than when its rows were "
            "written: this worker has another release of `tokenizers`, or the first cache changed"
        )
    return rows


def _encoded(
    rows: list[AlignedRow], part: Path, plan: Plan, records: LogitsRecords, maker: TargetMaker
) -> dict[str, list[bytes]]:
    """The rows' records by signal."""
    vocabulary = plan.teacher.vocabulary_size
    encoded: dict[str, list[bytes]] = {name: [] for name in plan.signals}
    counted = COUNTS in plan.signals
    tables = (
        load_tables(part, plan.statistics, vocabulary=vocabulary, signal=COUNTS)
        if counted
        else None
    )
    for one in maker.of_rows(rows):
        record = encode_head(records, one)
        encoded[LOGITS].append(record)
        if tables is not None:
            assert one.counts is not None
            head = records.decode(record, length=len(one.taught)) if len(one.targets) else None
            encoded[COUNTS].append(
                encode_counts(
                    one.counts,
                    row_key=one.row.key,
                    head=head or one.targets,
                    tables=tables,
                    vocabulary=vocabulary,
                )
            )
        rows_done.add(1, part=part)
    return encoded


def _maker(aligner: Aligner, plan: Plan, *, key: tuple) -> TargetMaker:
    """This process's maker for the plan, with its compiled programs."""
    with _lock:
        if key not in _makers:
            _makers.clear()
            logits, counts = plan.signals[LOGITS], plan.signals.get(COUNTS)
            assert isinstance(logits, LogitsSignal)
            draws = counts.draws if isinstance(counts, CountsSignal) else 0
            _makers[key] = TargetMaker(aligner, logits=logits, draws=draws)
        return _makers[key]
