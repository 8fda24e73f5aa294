"""Size of targets: bytes of records a scored position.

A record holds one row's codes, bitmap, header and checksum. A part's tables and ArrayRecord's own
blocks (at least 64 KiB a file) are left out, because they would dominate a study's small cache.
"""

from __future__ import annotations

import numpy as np

from benchmarks.quality.teacher import DenseTeacher
from benchmarks.quality.uncached import DRAWS_AT_A_TIME, count_ids, draw_ids_of_row
from decant.schemas import Cache
from decant.schemas.disk.array_record import RecordReaders
from decant.schemas.disk.layout import PartLayout

BYTES_PER_ID = 22.7 / 17.1
"""Bytes of an RS-KD id and its count in our codec with zstd, measured with 50 draws of the same
teacher (17.1 distinct ids in 22.7 bytes)."""


def record_bytes(cache: Cache) -> float:
    """Bytes of a cache's `logits` records a scored position."""
    readers, total = RecordReaders(), 0
    for part in cache.manifest.parts:
        layout = PartLayout(cache.path / part.path)
        for number, unit in enumerate(part.units):
            path, entry = layout.records("logits", number), unit.files["logits"]
            records = readers.read(path, range(entry.records), expected=entry)
            total += sum(map(len, records))
    mask = cache.read(cache.rows(), signals=())["loss_mask"]
    return total / int(mask.sum())


def draws_within(budget: float, teacher: DenseTeacher, rows: np.ndarray) -> tuple[int, float]:
    """The number of RS-KD's draws that fit into `budget` bytes a token, and their bytes.

    Estimated from the distinct ids in `rows`.
    """
    ids = np.concatenate(
        [draw_ids_of_row(teacher, int(row), draws=DRAWS_AT_A_TIME) for row in rows]
    )
    best = (1, BYTES_PER_ID)
    for draws in range(10, DRAWS_AT_A_TIME + 1, 10):
        taken = BYTES_PER_ID * (count_ids(ids[:, :draws])[1] > 0).sum(1).mean()
        if taken > budget:
            break
        best = (draws, float(taken))
    return best
