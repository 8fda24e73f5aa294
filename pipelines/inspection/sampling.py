"""Which rows of a cache statistics are made from: all of a small cache, a sample of a large one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from decant.schemas import Cache

POSITIONS = 1 << 18
"""Positions whose targets are read for statistics: about two seconds of decoding."""
_MOST_ROWS = 1 << 13
_BLOCKS = 128
"""Places of a large cache that the sample is from. Each opens a file or two, which may lie on a
network's disk."""


@dataclass(frozen=True)
class Sample:
    """Rows that stand for all rows of a cache. It depends on the cache and the numbers alone."""

    rows: Int64[np.ndarray, " rows"]
    """Their numbers, ascending."""
    of: int
    """Number of rows of the cache, without rows that hold only forgotten documents."""

    @property
    def whole(self) -> bool:
        """Whether every row is in it."""
        return len(self.rows) == self.of

    @property
    def words(self) -> str:
        """The sample in words."""
        if self.whole:
            return f"all {self.of:,} rows"
        return f"a sample of {len(self.rows):,} of the {self.of:,} rows, spread evenly"


def sample_rows(cache: Cache, *, positions: int = POSITIONS, rows: int | None = None) -> Sample:
    """The sample of at most `rows` rows; None: as many as hold `positions` positions."""
    numbers = cache.rows()
    most = rows or max(1, min(_MOST_ROWS, positions // cache.manifest.sequence_length))
    if len(numbers) <= most:
        return Sample(numbers, len(numbers))
    blocks = min(_BLOCKS, most)
    sizes = np.diff(np.arange(blocks + 1) * most // blocks)
    starts = np.arange(blocks) * len(numbers) // blocks
    chosen = [
        numbers[start : start + size] for start, size in zip(starts, sizes.tolist(), strict=True)
    ]
    return Sample(np.concatenate(chosen), len(numbers))
