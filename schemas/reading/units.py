"""Rows of one unit, read back as they were tokenised."""

from collections.abc import Sequence
from pathlib import Path

from decant.schemas.disk.array_record import RecordReaders
from decant.schemas.disk.layout import ROWS, PartLayout
from decant.schemas.manifest.manifest import Unit
from decant.schemas.records.rows import Row, decode_row


def read_unit_rows(
    part: Path, number: int, unit: Unit, *, offsets: Sequence[int] | None = None
) -> list[Row]:
    """The rows at `offsets` of unit `number`, or all. ValueError naming what is damaged."""
    path = PartLayout(part).records(ROWS, number)
    wanted = range(unit.rows) if offsets is None else offsets
    records = RecordReaders().read(path, wanted, expected=unit.files[ROWS])
    rows = []
    for offset, record in zip(wanted, records, strict=True):
        where = f"{path} record {offset}"
        row, key = decode_row(record, where=where)
        if row.key != key:
            raise ValueError(f"{where}: holds other tokens than its row key names")
        rows.append(row)
    return rows
