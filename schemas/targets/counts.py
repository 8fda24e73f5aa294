"""Counts: how often each id comes up in N equally spaced draws of the whole distribution at T = 1.

N points at distance 1/N, all shifted by one uniform start, are looked up in the cumulative sums of
the probabilities of all ids, in ascending order of ids. Id v is drawn N·p(v) times on average, and
never further than one from that. The target is counts/N: it sums to one, and its forward-KL
gradient is right on average. It says nothing about other temperatures.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

MOST_DRAWS = 1024


@dataclass(frozen=True)
class Counts:
    """The drawn ids of n positions, each with its count.

    `ids` int32 [n, m]: distinct and ascending within a position; 0 in an empty slot.
    `counts` int32 [n, m]: ≥ 1; 0 in an empty slot. Empty slots follow all others.
    `draws`: N, the sum of a position's counts.
    """

    ids: Int[np.ndarray, "n m"]
    counts: Int[np.ndarray, "n m"]
    draws: int

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, positions: slice | np.ndarray) -> "Counts":
        return Counts(self.ids[positions], self.counts[positions], self.draws)


def count_draws(drawn: Int[np.ndarray, "n N"]) -> Counts:
    """The counts of drawn ids, which may be in any order within a position."""
    n, draws = drawn.shape
    drawn = np.sort(drawn, axis=1)
    first = np.ones(drawn.shape, bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    distinct = first.sum(axis=1)
    slot = np.cumsum(first, axis=1) - 1
    ids = np.zeros((n, int(distinct.max(initial=0))), np.int32)
    counts = np.zeros_like(ids)
    row, at = np.nonzero(first)
    ids[row, slot[row, at]] = drawn[row, at]
    starts = row * draws + at
    counts[row, slot[row, at]] = np.diff(starts, append=n * draws)
    return Counts(ids, counts, draws)
