"""Size of targets: bytes of records a scored position.

A record holds one row's codes, bitmap, header and checksum. A part's tables and ArrayRecord's own
blocks (at least 64 KiB a file) are left out, because they would dominate a study's small cache.
"""

from __future__ import annotations

import numpy as np

from decant.schemas import Cache
from decant.schemas.codecs import counts_field
from decant.schemas.disk.array_record import RecordReaders
from decant.schemas.disk.layout import RECORDS, PartLayout
from decant.schemas.records.companion import encode_counts
from decant.schemas.targets.counts import Counts
from decant.schemas.targets.targets import Targets


def record_bytes(cache: Cache) -> float:
    """Bytes of a cache's records of targets a scored position: `logits`, `counts`, `sketch`."""
    readers, total = RecordReaders(), 0
    for part in cache.manifest.parts:
        layout = PartLayout(cache.path / part.path)
        for number, unit in enumerate(part.units):
            for signal in (name for name in RECORDS if name in unit.files):
                path, entry = layout.records(signal, number), unit.files[signal]
                records = readers.read(path, range(entry.records), expected=entry)
                total += sum(map(len, records))
    mask = cache.read(cache.rows(), signals=())["loss_mask"]
    return total / int(mask.sum())


def counts_bytes(
    counts: Counts, rows: np.ndarray, *, calibration: np.ndarray, vocabulary: int
) -> float:
    """Bytes a position of `counts` in records of their own, without a head.

    `rows` [n] is the row of each position. The codec's tables are fitted to the positions of the
    rows `calibration`, which are not judged.
    """
    fitted = np.isin(rows, calibration)
    tables = counts_field.fit(counts[fitted], head=_no_head(fitted.sum()), vocabulary=vocabulary)
    total = 0
    for row in np.unique(rows[~fitted]):
        of_row = counts[rows == row]
        head = _no_head(len(of_row))
        shared = {"head": head, "tables": tables, "vocabulary": vocabulary}
        total += len(encode_counts(of_row, row_key=bytes(16), **shared))
    return total / int((~fitted).sum())


def _no_head(positions: int) -> Targets:
    return Targets(
        np.zeros((positions, 0), np.int32),
        np.zeros((positions, 0), np.float32),
        np.zeros((positions, 0), np.float32),
    )
