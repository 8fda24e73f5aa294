"""Logits records as readers decode them: counts are coded with the ids that these hold."""

from dataclasses import dataclass
from pathlib import Path

from decant.schemas.codecs import Tables
from decant.schemas.disk.array_record import RecordReaders
from decant.schemas.disk.layout import LOGITS, PartLayout
from decant.schemas.manifest.plan import Plan
from decant.schemas.manifest.statistics import load_tables
from decant.schemas.records.logits import decode_logits, encode_logits, open_logits
from decant.schemas.records.rows import Row
from decant.schemas.signals import LogitsSignal
from decant.schemas.targets.targets import Targets


@dataclass(frozen=True, eq=False)
class LogitsRecords:
    """Writes and reads the logits records of a part."""

    signal: LogitsSignal
    tables: Tables
    vocabulary: int

    def encode(self, row: Row, targets: Targets, *, finite: bool = True) -> bytes:
        """The record of a row; without targets if they are not `finite`."""
        return encode_logits(
            targets if finite else targets[:0],
            row_key=row.key,
            scored=row.loss_mask & finite,
            profile=self.signal.profile,
            tables=self.tables,
            vocabulary=self.vocabulary,
            mass=self.signal.mass,
        )

    def decode(self, record: bytes, *, length: int, where: str = "a new record") -> Targets:
        """The targets that a reader of the record gets; `length` is that of the row."""
        opened = open_logits(record, where=where, length=length, spec=self.signal)
        return decode_logits([opened], tables=self.tables, vocabulary=self.vocabulary)


def records_of(plan: Plan, part: Path) -> LogitsRecords | None:
    """The logits records of the plan, or those that its counts are coded with; None if neither."""
    signal = plan.signals.get(LOGITS, plan.coded_with)
    if signal is None:
        return None
    assert isinstance(signal, LogitsSignal)
    vocabulary = plan.teacher.vocabulary_size + signal.unmatched
    tables = load_tables(part, plan.statistics, vocabulary=vocabulary)
    return LogitsRecords(signal, tables, vocabulary)


def sealed_heads(plan: Plan, part: Path, unit: int, offsets: list[int]) -> list[Targets]:
    """What the sealed logits records of some rows of a unit decode to."""
    records = records_of(plan, part)
    assert records, "the plan names the logits that are sealed"
    path = PartLayout(part).records(LOGITS, unit)
    read = RecordReaders().read(path, offsets, expected=plan.rows.units[unit].files[LOGITS])
    length = plan.teacher.sequence_length
    return [
        records.decode(record, length=length, where=f"{path} record {offset}")
        for offset, record in zip(offsets, read, strict=True)
    ]
