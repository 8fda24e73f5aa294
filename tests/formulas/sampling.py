"""Independent formula of tail draws: systematic sampling from dense logits in float64."""

import numpy as np

from decant.schemas.targets.draws import Draws
from decant.schemas.targets.targets import BETAS, Targets


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = np.asarray(logits, np.float64)
    return x - np.logaddexp.reduce(x, axis=1, keepdims=True)


def top_ids(logits: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k largest logits, ties by ascending id: int [n, k]."""
    return np.argsort(-np.asarray(logits, np.float64), axis=1, kind="stable")[:, :k]


def tail_of(logits: np.ndarray, k: int) -> np.ndarray:
    """Which tokens are in the tail, outside the top-k: bool [n, V]."""
    tail = np.ones(np.shape(logits), bool)
    np.put_along_axis(tail, top_ids(logits, k), False, axis=1)
    return tail


def proposal(logits: np.ndarray, *, k: int, betas: tuple[float, ...]) -> np.ndarray:
    """r [n, V]: equal mixture of the tails at each β, each normalised over the tail."""
    logp, tail = log_softmax(logits), tail_of(logits, k)
    shares = [np.where(tail, np.exp(beta * logp), 0) for beta in betas]
    return sum(share / share.sum(1, keepdims=True) for share in shares) / len(betas)


def ids_at(weights: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The id in whose interval of the cumulative weights each point lies: int [n, m]."""
    ends = np.cumsum(weights, axis=1)
    return np.stack(
        [np.searchsorted(e, x, side="right") for e, x in zip(ends, points, strict=True)]
    )


def tail_draws(
    logits: np.ndarray, starts: np.ndarray, *, k: int, m: int, betas: tuple[float, ...] = (1.0,)
) -> Draws:
    """m systematic draws per position."""
    points = (np.arange(m) + starts[:, None]) / m
    ids = ids_at(proposal(logits, k=k, betas=betas), points)
    logprobs = np.take_along_axis(log_softmax(logits), ids, 1)
    return Draws(ids.astype(np.int32), logprobs.astype(np.float32), betas)


def with_draws(
    logits: np.ndarray, starts: np.ndarray, *, k: int, m: int, betas: tuple[float, ...] = (1.0,)
) -> Targets:
    """Targets of dense logits with tail draws, at the nodes `BETAS`."""
    logp, ids = log_softmax(logits), top_ids(logits, k)
    tail = tail_of(logits, k)
    nodes = [np.logaddexp.reduce(np.where(tail, beta * logp, -np.inf), 1) for beta in BETAS]
    return Targets(
        ids.astype(np.int32),
        np.take_along_axis(logp, ids, 1).astype(np.float32),
        np.stack(nodes, 1).astype(np.float32),
        tail_draws(logits, starts, k=k, m=m, betas=betas),
    )
