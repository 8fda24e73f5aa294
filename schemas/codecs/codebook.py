"""The codebook: many orders of the vocabulary; one of them has a position's top-k near its front.

Ids of a sample are ranked by frequency. An order lists the `depth` ids that are likeliest at its
kind of position. An id that the order does not list has place depth + its rank.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Integer

from decant.schemas.codecs.block import Tables
from decant.schemas.codecs.fast import permutation

_PART = 1024
_OFFSET = 16
"""The cost of place r is log2(r + 16) bits, about the bits of gaps between places up to a constant.
It chooses better than the log-odds from which the orders were made."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """Look-up tables for one set of `Tables`."""

    depth: int
    rank: Integer[np.ndarray, " vocabulary"]
    """Rank of each id by frequency."""
    inverse: Integer[np.ndarray, "listed_and_one orders"]
    """Place of each rank in each order; `depth` if the order does not list it."""
    cost: Integer[np.ndarray, "listed_and_one orders"]
    """Cost in quarter bits above the cheapest place, at most 63, so that four fit into a byte."""
    flat: Integer[np.ndarray, " places"]
    """All ids by rank, then the ids of order 0, of order 1, …"""

    @property
    def orders(self) -> int:
        """Number of orders, at most 256."""
        return self.inverse.shape[1]

    def choose(self, ids: Integer[np.ndarray, "n k"]) -> Integer[np.ndarray, " n"]:
        """The cheapest order for each position."""
        if self.orders == 1:
            return np.zeros(len(ids), np.intp)
        # In parts, so that the sums stay in the processor's cache.
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
        """The place of each id in the order `chosen` for its position: int32 [n, k]."""
        rank = self.rank.take(ids, mode="clip")
        listed = np.minimum(rank, len(self.inverse) - 1)
        place = self.inverse.reshape(-1).take(
            listed * self.orders + chosen[:, None].astype(np.int32)
        )
        return np.where(place < self.depth, place.astype(np.int32), rank + np.int32(self.depth))

    def ids(self, places: Integer[np.ndarray, "k n"], *, chosen: Integer[np.ndarray, " n"]):
        """The inverse of `places`, positions in columns: ids [k, n]. Places must be in range."""
        return self.ids_from(places, self.starts(chosen))

    def starts(self, chosen: Integer[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        """Where in `flat` the order of each position ends, which `ids_from` counts back from."""
        return chosen.astype(np.int32) * np.int32(self.depth) + np.int32(
            len(self.rank) + self.depth
        )

    def ids_from(
        self, places: Int32[np.ndarray, "*shape"], start: Int32[np.ndarray, "..."]
    ) -> Integer[np.ndarray, "*shape"]:
        """The ids at `places`, where `start` are `starts` of each place's order."""
        beyond = places - np.int32(self.depth)
        # `start` is added only below `depth`, where the sign bits are 1. np.where would take three
        # times as long.
        at = beyond >> 31
        at &= start
        at += beyond
        return self.flat.take(at, mode="clip")


def codebook(tables: Tables, *, vocabulary: int) -> Codebook:
    """The codebook of tables["order"] and tables["orders"], cached in `tables`."""

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
            # The narrowest type that holds an id, so that these random look-ups stay in the
            # processor's cache.
            flat=np.concatenate([order, order[orders.reshape(-1)]]).astype(
                np.min_scalar_type(vocabulary - 1)
            ),
        )

    return tables.compute_once(f"codebook {vocabulary}", build)


def _costs(inverse: Integer[np.ndarray, "listed orders"], *, depth: int) -> np.ndarray:
    """The cost of each rank in each order, uint8, without an 8-byte intermediate array."""

    def quarter_bits(place: np.ndarray) -> np.ndarray:
        cost = np.rint(4 * (np.log2(place + _OFFSET) - np.log2(_OFFSET)))
        return np.minimum(cost, 63).astype(np.uint8)

    cost = quarter_bits(np.arange(depth + 1)).take(inverse)
    absent = quarter_bits(depth + np.arange(len(inverse)))
    return np.where(inverse < depth, cost, absent[:, None])
