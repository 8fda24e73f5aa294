"""Stored heads and counts given to the student's ids, without a distribution of all ids.

A teacher's id v gives its probability to `first[v]`; those of ids that meet add up. The label's
share by the chain rule (`positions.py`) moves to the label. Ids that the student cannot spell
(−1) are left out, and all others grow by the same factor. Of ids in the tail only the text's own
next token is known; the rest of the tail stays one bucket, at T = 1.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from decant.pipelines.alignment.positions import Positions
from decant.schemas.targets.counts import Counts, count_draws
from decant.schemas.targets.sizes import ladder
from decant.schemas.targets.targets import Targets, tail_size_logmass

_LEAST = 1e-30


def project_head(
    ids: Int[np.ndarray, "n k"],
    logprobs: Float[np.ndarray, "n k"],
    tail_logmass: Float[np.ndarray, " n"],
    at: Positions,
    *,
    first: Int[np.ndarray, " vocabulary"],
    size: int,
    betas: tuple[float, ...],
) -> Targets:
    """Targets over `size` student ids, of positions with different numbers of ids, k at most.

    `tail_logmass` is at T = 1. The nodes of the result are right at β = 1; the others are those of
    a flat tail. Log-probabilities of labels are what head and chain rule know: the least that the
    projected distribution gives them.
    """
    n, k = ids.shape
    held = np.isfinite(logprobs)
    p = np.where(held, np.exp(logprobs.astype(np.float64)), 0.0)
    tail = np.exp(tail_logmass.astype(np.float64))
    is_next = held & (ids == at.following[:, None])
    in_head = is_next.any(1)
    from_tail = np.where(in_head, 0.0, np.minimum(np.exp(at.label_logprob), tail))
    of_next = (p * is_next).sum(1) + from_tail
    moved = of_next * at.moved
    p = p - np.where(is_next, moved[:, None], 0.0)
    entries = np.column_stack([np.where(held, first[ids], -1), at.first, at.label])
    masses = np.column_stack([p, from_tail - np.where(in_head, 0.0, moved), moved])
    whole = np.where(entries >= 0, masses, 0.0).sum(1) + tail - from_tail
    row, met, mass = _added(entries, masses / np.maximum(whole, _LEAST)[:, None], size=size)
    own = np.bincount(row, np.where(met == at.label[row], mass, 0.0), n)
    return _largest(row, met, mass, n=n, k=k, size=size, betas=betas, labels=own)


def _added(
    ids: Int[np.ndarray, "n m"], masses: Float[np.ndarray, "n m"], *, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(position, id, mass) of each id with a mass, once; by position, then by id."""
    row, column = np.nonzero((ids >= 0) & (masses > 0))
    keys = row * np.int64(size) + ids[row, column]
    distinct, inverse = np.unique(keys, return_inverse=True)
    return distinct // size, distinct % size, np.bincount(inverse, masses[row, column])


def _largest(row, met, mass, *, n, k, size, betas, labels) -> Targets:
    """Targets of the k largest masses of each position; the others join the tail."""
    order = np.lexsort((met, -mass, row))
    row, met, mass = row[order], met[order], mass[order]
    counts = np.bincount(row, minlength=n)
    rank = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
    rungs = ladder(min(k, size))
    sizes = rungs[np.maximum(np.searchsorted(rungs, counts, side="right") - 1, 0)]
    kept = rank < sizes[row]
    ids, logprobs = np.zeros((n, k), np.int32), np.full((n, k), -np.inf, np.float32)
    ids[row[kept], rank[kept]] = met[kept]
    logprobs[row[kept], rank[kept]] = np.log(mass[kept])
    tail = np.maximum(1 - np.bincount(row[kept], mass[kept], n), _LEAST)
    flat = np.array([tail_size_logmass(vocabulary=size, k=int(own)) for own in sizes])
    beta, some = np.array(betas), np.isfinite(flat)
    nodes = np.full((n, len(betas)), -np.inf)  # an empty tail
    nodes[some] = (1 - beta) * flat[some, None] + beta * np.log(tail[some])[:, None]
    with np.errstate(divide="ignore"):
        own = np.log(np.minimum(labels, 1.0))
    return Targets(
        ids,
        logprobs,
        nodes.astype(np.float32),
        label_logprobs=own.astype(np.float32),
        sizes=sizes,
    )


def project_counts(
    counts: Counts,
    at: Positions,
    *,
    first: Int[np.ndarray, " vocabulary"],
    starts: Float[np.ndarray, " n"],
    size: int,
) -> tuple[Counts, Bool[np.ndarray, " n"]]:
    """Counts over `size` student ids, right on average as the teacher's are; and where there are
    any.

    `starts` [n], uniform in [0, 1), decide how a share of a count is rounded.
    """
    n = len(counts)
    own = counts.ids == at.following[:, None]
    of_next = np.where(own & (counts.counts > 0), counts.counts, 0)
    moved = np.floor(of_next * at.moved[:, None] + starts[:, None]).astype(np.int64)
    moved = np.minimum(moved, of_next)
    entries = np.column_stack([first[counts.ids], at.label])
    left = np.column_stack([counts.counts - moved, moved.sum(1)])
    row, met, many = _added(entries, left.astype(np.float64), size=size)
    drawn = np.repeat(met, many.astype(np.int64))
    of_row = np.bincount(row, many, n).astype(np.int64)
    begin = np.cumsum(of_row) - of_row
    # Draws of ids that the student cannot spell are replaced by others, evenly spaced.
    points = (np.arange(counts.draws) + starts[:, None]) * (of_row / counts.draws)[:, None]
    some = of_row > 0
    index = np.minimum(points.astype(np.int64), np.maximum(of_row - 1, 0)[:, None])
    picked = np.zeros((n, counts.draws), np.int64)
    picked[some] = drawn[(begin[:, None] + index)[some]]
    return count_draws(picked.astype(np.int32)), some


def matched_head(
    ids: Int[np.ndarray, "n k"],
    logprobs: Float[np.ndarray, "n k"],
    *,
    partners: Int[np.ndarray, " vocabulary"],
    size: int,
) -> Int[np.ndarray, "n k"]:
    """The ids of the teacher's own head, as `LogitsSignal.unmatched` says.

    `partners` is the student's id that a teacher's id is exactly, −1 for none. One that two ids of
    a position have is given to the likelier.
    """
    k = ids.shape[1]
    partner = np.where(np.isfinite(logprobs), partners[ids], -1)
    same = (partner[:, :, None] == partner[:, None, :]) & (partner[:, :, None] >= 0)
    taken = (same & np.tri(k, k, -1, bool)).any(2)
    return np.where((partner < 0) | taken, size + np.arange(k), partner).astype(np.int32)
