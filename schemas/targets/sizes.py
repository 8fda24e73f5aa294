"""Adaptive heads: how many of its k ids a position stores, so that they hold a share of its mass.

Sizes are rungs of a ladder, 1, 2, 3, 4, 6, 8, 12, 16, 24 … k, so that many positions of a row have
one size and are encoded together.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Integer

from decant.schemas.targets.targets import Targets, nodes_of

_FEWEST_IDS = 96
"""Positions of one size move up to the next size if that costs fewer ids than this; a size of its
own costs a record about as many bytes."""


def ladder(k: int) -> Integer[np.ndarray, " sizes"]:
    """The sizes that heads of at most `k` ids may have, ascending; the last one is k."""
    return np.array([*(size for size in _rungs() if size < k), k]) if k else np.zeros(0, int)


def _rungs() -> Iterator[int]:
    yield 1
    size = 2
    while size < 1 << 20:
        yield size
        yield size * 3 // 2
        size *= 2


def sizes_for(logprobs: Float[np.ndarray, "n k"], *, mass: float) -> Integer[np.ndarray, " n"]:
    """The size of each position of one row: the least whose ids hold `mass`, or k; then sizes of
    few positions move up.

    `logprobs` are in nats, descending.
    """
    k = logprobs.shape[1]
    rungs = ladder(k)
    below = np.cumsum(np.exp(logprobs.astype(np.float64)), axis=1) < mass
    rung = np.searchsorted(rungs, np.minimum(below.sum(1) + 1, k))
    present = np.unique(rung)
    for here, above in pairwise(present):
        alike = rung == here
        if np.count_nonzero(alike) * (rungs[above] - rungs[here]) < _FEWEST_IDS:
            rung[alike] = above
    return rungs[rung]


def shortened(targets: Targets, sizes: Integer[np.ndarray, " n"]) -> Targets:
    """The targets with `sizes[i]` ids of position i; the others join its tail. Computed in float64.

    Ids beyond a position's size are 0 with log-probability −inf.
    """
    beyond = np.arange(targets.k) >= sizes[:, None]
    dropped = np.where(beyond, targets.logprobs.astype(np.float64), -np.inf)
    tail = targets.tail_logmass.astype(np.float64)
    for node, beta in enumerate(nodes_of(tail)):
        with np.errstate(divide="ignore"):
            added = np.log(np.exp(beta * dropped).sum(1) if beta else beyond.sum(1))
        tail[:, node] = np.logaddexp(tail[:, node], added)
    return Targets(
        ids=np.where(beyond, 0, targets.ids).astype(np.int32),
        logprobs=np.where(beyond, -np.inf, targets.logprobs).astype(np.float32),
        tail_logmass=tail.astype(np.float32),
        label_logprobs=targets.label_logprobs,
        sizes=sizes,
    )
