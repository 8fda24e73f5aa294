"""Many orders of the vocabulary, so that a position's top-k sits near the front of one of them.

Ids of a sample are ranked by frequency. Each order names the `depth` ids that its kind of
position is likeliest to hold; every id that it does not name follows at depth + its rank.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from decant.schemas.codecs.block import Tables
from decant.schemas.codecs.fast import permutation

_PART = 1024
_OFFSET = 16
"""The cost of place r is log2(r + 16) bits: what gaps between places cost, give or take a
constant. It chose better than the log-odds that the orders were made from."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """Look-ups for one set of tables."""

    depth: int
    rank: Integer[np.ndarray, " vocabulary"]
    """Rank of each id by frequency."""
    inverse: Integer[np.ndarray, "listed_and_one orders"]
    """Place of each rank in each order; `depth` where the order does not name it."""
    cost: Integer[np.ndarray, "listed_and_one orders"]
    """Quarter bits above the cheapest, at most 63: four of them fit into a byte."""
    flat: Integer[np.ndarray, " places"]
    """All ids by rank; then those of order 0, of order 1, …"""

    @property
    def orders(self) -> int:
        """How many orders there are, at most 256."""
        return self.inverse.shape[1]

    def choose(self, ids: Integer[np.ndarray, "n k"]) -> Integer[np.ndarray, " n"]:
        """The cheapest order for each position."""
        if self.orders == 1:
            return np.zeros(len(ids), np.intp)
        # Sums over one part at a time stay in the processor's cache.
        parts = [ids[at : at + _PART] for at in range(0, len(ids), _PART)]
        return np.concatenate([self._choose(part) for part in parts])

    def _choose(self, ids: Integer[np.ndarray, "n k"]) -> Integer[np.ndarray, " n"]:
        ranks = np.minimum(self.rank.take(ids.T), len(self.cost) - 1)
        total = np.zeros((len(ids), self.orders), np.uint32 if len(ranks) > 1024 else np.uint16)
        four, one = np.empty((2, len(ids), self.orders), np.uint8)
        for at in range(0, len(ranks), 4):
            self.cost.take(ranks[at], axis=0, out=four, mode="clip")
            for rank in ranks[at + 1 : at + 4]:
                self.cost.take(rank, axis=0, out=one, mode="clip")
                four += one
            total += four
        return total.argmin(1)

    def places(self, ids: Integer[np.ndarray, "n k"], *, chosen: Integer[np.ndarray, " n"]):
        """int32 [n, k]: where each id stands in its position's order."""
        rank = self.rank.take(ids, mode="clip")
        listed = np.minimum(rank, len(self.inverse) - 1)
        place = self.inverse.reshape(-1).take(
            listed * self.orders + chosen[:, None].astype(np.int32)
        )
        return np.where(place < self.depth, place.astype(np.int32), rank + np.int32(self.depth))

    def ids(self, places: Integer[np.ndarray, "k n"], *, chosen: Integer[np.ndarray, " n"]):
        """The inverse of `places`, for positions in columns. Places must be in range."""
        beyond = places - np.int32(self.depth)
        start = chosen.astype(np.int32) * np.int32(self.depth) + np.int32(
            len(self.rank) + self.depth
        )
        # Nothing from `depth` on, where the sign is 0; np.where takes three times as long.
        at = beyond >> 31
        at &= start
        at += beyond
        return self.flat.take(at, mode="clip")


def codebook(tables: Tables, *, vocabulary: int) -> Codebook:
    """The look-ups that belong to tables["order"] and tables["orders"], made once."""

    def build(tables: Tables) -> Codebook:
        order, rank = permutation(tables, vocabulary=vocabulary)
        orders = tables["orders"].astype(np.int64)
        count, depth = orders.shape
        listed = len(tables["order"])
        inverse = np.full((listed + 1, count), depth, np.uint16)
        inverse[orders, np.arange(count)[:, None]] = np.arange(depth, dtype=np.uint16)
        return Codebook(
            depth=depth,
            rank=rank,
            inverse=inverse,
            cost=_costs(inverse, depth=depth),
            # As few bytes as hold an id: they are looked up all over, and so stay in the cache.
            flat=np.concatenate([order, order[orders.reshape(-1)]]).astype(
                np.min_scalar_type(vocabulary - 1)
            ),
        )

    return tables.compute_once(f"codebook {vocabulary}", build)


def _costs(inverse: Integer[np.ndarray, "listed orders"], *, depth: int) -> np.ndarray:
    """A byte each, without an intermediate of eight: look-ups by place, then by rank."""

    def quarter_bits(place: np.ndarray) -> np.ndarray:
        cost = np.rint(4 * (np.log2(place + _OFFSET) - np.log2(_OFFSET)))
        return np.minimum(cost, 63).astype(np.uint8)

    cost = quarter_bits(np.arange(depth + 1)).take(inverse)
    absent = quarter_bits(depth + np.arange(len(inverse)))
    return np.where(inverse < depth, cost, absent[:, None])
