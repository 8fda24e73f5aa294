"""Choose the orders of the codebook by clustering the top-k sets of the calibration sample."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Integer

from decant.schemas.codecs.block import Tables
from decant.schemas.codecs.codebook import codebook

_COUNTS = (256, 64, 16, 4, 1)
_PER_ORDER = 64
"""Fewest positions in the sample per order."""
_MOST_POSITIONS = 1 << 17
_CORPUS = 20
"""The corpus has at least this many times the sample's positions; it shares the tables' bytes."""
_DEPTH = 2048
_FEATURES = 1024
_DIMENSIONS = 64
_ROUNDS = 8
_REFINEMENTS = 3
_PRIOR = 4.0
"""Weight, in positions, of the whole sample's frequencies in each cluster."""


def choose_orders(
    ids: Integer[np.ndarray, "n k"],
    *,
    order: Integer[np.ndarray, " listed"],
    vocabulary: int,
    cost: Callable[[np.ndarray, Integer[np.ndarray, "n k"]], int],
) -> Integer[np.ndarray, "count depth"]:
    """The cheapest orders, uint16 [count, depth], judged on positions they were not made from.

    `ids` is the sample's top-k; `order` lists ids by frequency. `cost(orders, ids)` is the number
    of bytes for the positions `ids`. It is computed over the sample's last eighth; the tables'
    share of bytes is added.
    """
    learn = ids[: len(ids) - len(ids) // 8]
    judge = ids[len(learn) :]
    learn = learn[:: 1 + len(learn) // _MOST_POSITIONS]
    best, least = None, np.inf
    for count in _COUNTS:
        if count > 1 and count * _PER_ORDER > len(learn):
            continue
        orders = find_orders(learn, order=order, count=count, vocabulary=vocabulary)
        positions_cost = cost(orders, judge) if len(judge) else 0
        total = positions_cost + orders.nbytes / (8 * _CORPUS)
        if total > least:
            break
        best, least = orders, total
    assert best is not None
    return best


def find_orders(
    ids: Integer[np.ndarray, "n k"],
    *,
    order: Integer[np.ndarray, " listed"],
    count: int,
    vocabulary: int,
) -> np.ndarray:
    """`count` orders, uint16 [count, depth]: each lists ranks in `order`, likeliest first.

    k-means on embedded top-k sets finds the clusters. Refinement then assigns each set to the order
    in which it costs least. Deterministic.
    """
    depth = min(_DEPTH, len(order))
    if count == 1:
        return np.arange(depth, dtype=np.uint16)[None]
    rank = np.full(vocabulary, len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    ranks = rank[ids]
    chosen = _k_means(_embed(ranks, listed=len(order)), count=count)
    for _ in range(_REFINEMENTS):
        orders = _orders(ranks, chosen=chosen, count=count, listed=len(order), depth=depth)
        book = codebook(Tables({"order": order, "orders": orders}), vocabulary=vocabulary)
        chosen = book.choose(ids)
    return _orders(ranks, chosen=chosen, count=count, listed=len(order), depth=depth)


def _orders(
    ranks: Integer[np.ndarray, "n k"], *, chosen: np.ndarray, count: int, listed: int, depth: int
) -> np.ndarray:
    """Each cluster's ids by their frequency in it, smoothed by the whole sample."""
    overall = np.bincount(ranks.reshape(-1), minlength=listed + 1)[:listed]
    prior = _PRIOR / len(ranks) * overall
    orders = np.empty((count, depth), np.uint16)
    for cluster in range(count):
        members = np.bincount(ranks[chosen == cluster].reshape(-1), minlength=listed + 1)
        orders[cluster] = np.argsort(-(members[:listed] + prior), kind="stable")[:depth]
    return orders


def _embed(ranks: Integer[np.ndarray, "n k"], *, listed: int) -> Float[np.ndarray, "n d"]:
    """Unit vectors: the sets projected on principal directions over the most informative ids."""
    n, k = ranks.shape
    share = np.bincount(ranks.reshape(-1), minlength=listed + 1)[:listed] / n
    weight = np.log(1 / np.clip(share, 1e-9, 1))
    features = np.argsort(-share * weight**2, kind="stable")[:_FEATURES]
    column = np.full(listed + 1, len(features))
    column[features] = np.arange(len(features))
    weights = np.append(weight[features], 0).astype(np.float32)
    sample = column[ranks[:: max(1, n // 8192)]]
    dense = np.zeros((len(sample), len(features) + 1), np.float32)
    dense[np.arange(len(sample))[:, None], sample] = weights[sample]
    _, directions = np.linalg.eigh(dense.T @ dense)
    table = (weights[:, None] * directions[:, -_DIMENSIONS:]).astype(np.float32)
    embedded = np.zeros((n, table.shape[1]), np.float32)
    for rank in range(k):
        embedded += table[column[ranks[:, rank]]]
    return embedded / (np.linalg.norm(embedded, axis=1, keepdims=True) + 1e-9)


def _k_means(points: Float[np.ndarray, "n d"], *, count: int) -> Integer[np.ndarray, " n"]:
    """Spherical k-means from random points of the sample; the cluster of each point."""
    rng = np.random.default_rng(0)
    centres = points[rng.permutation(len(points))[:count]]
    for _ in range(_ROUNDS):
        chosen = (points @ centres.T).argmax(1)
        sums = np.zeros_like(centres)
        np.add.at(sums, chosen, points)
        empty = np.bincount(chosen, minlength=count) == 0
        sums[empty] = points[rng.integers(len(points), size=int(empty.sum()))]
        centres = sums / (np.linalg.norm(sums, axis=1, keepdims=True) + 1e-9)
    return (points @ centres.T).argmax(1)
