"""What targets cost: bytes a scored position, of the records alone.

A record is everything of one row: codes, bitmap, header and checksum. Left out are the tables of a
part and ArrayRecord's own blocks (64 KiB a file at least), which a study's small cache would
mistake for content.
"""

from __future__ import annotations

import numpy as np

from benchmarks.quality.teacher import DenseTeacher
from benchmarks.quality.uncached import DRAWS_AT_A_TIME, counted, drawn
from decant.schemas import Cache
from decant.schemas.disk.array_record import RecordReaders
from decant.schemas.disk.layout import PartLayout

BYTES_PER_ID = 22.7 / 17.1
"""Of RS-KD's ids and counts through our codec, zstd and all, as measured on 50 draws of the same
teacher (17.1 distinct ids in 22.7 bytes)."""


def record_bytes(cache: Cache) -> float:
    """Bytes of `logits` a scored position."""
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
    """How many of RS-KD's draws `budget` bytes a token pay for, and what they take.

    Judged by the distinct ids of a few rows.
    """
    ids = np.concatenate([drawn(teacher, int(row), draws=DRAWS_AT_A_TIME) for row in rows])
    best = (1, BYTES_PER_ID)
    for draws in range(10, DRAWS_AT_A_TIME + 1, 10):
        taken = BYTES_PER_ID * (counted(ids[:, :draws])[1] > 0).sum(1).mean()
        if taken > budget:
            break
        best = (draws, float(taken))
    return best
