"""The order `data.shuffle = "blocks"`: rows in blocks, shuffled so that reads stay in few blocks.

A block is 64 neighbouring rows. Each epoch permutes all blocks and cuts their rows into windows of
256 blocks. A window is dealt to 64 groups: each gets the rows of 4 blocks, permuted. Successive
positions take turns between the groups. A run therefore reads from 256 blocks at a time, and a
batch still mixes rows of many blocks.

Positions take the groups in bit-reversed order: 0, 32, 16, 48, … Any `n` successive positions then
take one group from each n-th of the groups, if `n` is a power of two. So a batch that is sorted by
group gives each of `n` processes rows of its own groups, whose blocks no other process reads.

A row depends on the position, the rows and the seed alone. The random numbers are raw output of
Philox, which is the same in all releases of numpy; numpy's own permutations are not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

BLOCK_ROWS = 64
GROUPS = 64
WINDOW_ROWS = 256 * BLOCK_ROWS
_POSITIONS = 10**12
"""More than any run needs."""
_GROUP_OF = np.array([int(f"{place:06b}"[::-1], 2) for place in range(GROUPS)], np.int16)


class BlockOrder:
    """An endless sequence: at each position (group, row), every row once an epoch."""

    def __init__(self, rows: Int[np.ndarray, " rows"], *, seed: int):
        """`rows` are row numbers, neighbours in the cache beside each other; at least one."""
        self._rows, self._seed = rows, seed
        self._window = functools.lru_cache(maxsize=4)(self._make_window)
        self._blocks = functools.lru_cache(maxsize=2)(self._make_blocks)

    def __len__(self) -> int:
        return _POSITIONS

    def __getitem__(self, index: int) -> tuple[int, int]:
        epoch, place = divmod(index, len(self._rows))
        window, offset = divmod(place, WINDOW_ROWS)
        return int(_GROUP_OF[index % GROUPS]), int(self._window(epoch, window)[offset])

    def _make_window(self, epoch: int, window: int) -> Int[np.ndarray, " window"]:
        start = window * WINDOW_ROWS
        places = np.arange(start, min(start + WINDOW_ROWS, len(self._rows)))
        first, second = self._random(2 * len(places), epoch, window + 1).reshape(2, -1)
        groups = _GROUP_OF[(epoch * len(self._rows) + places) % GROUPS]
        dealt = np.argsort(groups, kind="stable")
        blocks, ends = self._blocks(epoch)
        at = np.searchsorted(ends, places, side="right")
        # From the end of the block, because the last block of the cache may be shorter.
        rows = np.minimum((blocks[at] + 1) * BLOCK_ROWS, len(self._rows)) - (ends[at] - places)
        # Also permuted inside blocks: in a small cache a group has less than a block.
        rows = rows[np.lexsort((first, at))]
        order = np.empty(len(places), np.int64)
        order[dealt] = rows[np.lexsort((second, groups[dealt]))]
        return self._rows[order]

    def _make_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of blocks, and the place after each block's last row."""
        count = -(-len(self._rows) // BLOCK_ROWS)
        blocks = np.argsort(self._random(count, epoch, 0), kind="stable")
        sizes = np.minimum(len(self._rows) - blocks * BLOCK_ROWS, BLOCK_ROWS)
        return blocks, np.cumsum(sizes)

    def _random(self, count: int, epoch: int, stream: int) -> np.ndarray:
        bits = np.random.Philox(key=[self._seed, epoch], counter=[0, stream, 0, 0])
        return np.asarray(bits.random_raw(count))


def sorted_by_group(elements: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """A batch's arrays, of which the first holds groups: the others, in the order of the groups."""
    groups, *others = elements
    order = np.argsort(groups, kind="stable")
    return tuple(values[order] for values in others)
