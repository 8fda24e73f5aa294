"""Read the rows of one unit, before or after sealing."""

from collections.abc import Sequence
from pathlib import Path

from decant.schemas.disk.array_record import RecordReaders
from decant.schemas.disk.layout import ROWS, PartLayout
from decant.schemas.manifest.manifest import Unit
from decant.schemas.records.rows import Row, decode_row


def read_unit_rows(
    part: Path, number: int, unit: Unit, *, length: int, offsets: Sequence[int] | None = None
) -> list[Row]:
    """The rows of unit `number` of a part directory, at `offsets` or all, of `length` positions.

    ValueError naming the file or record that is damaged.
    """
    path = PartLayout(part).records(ROWS, number)
    numbers = range(unit.rows) if offsets is None else offsets
    records = RecordReaders().read(path, numbers, expected=unit.files[ROWS])
    rows = []
    for offset, record in zip(numbers, records, strict=True):
        where = f"{path} record {offset}"
        row, key = decode_row(record, where=where, length=length)
        if row.key != key:
            raise ValueError(f"{where}: its tokens do not match its row key")
        rows.append(row)
    return rows
