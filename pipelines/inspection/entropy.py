"""Entropy of stored next-token distributions."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Integer

from decant.schemas.targets.targets import tail_logmass_at

_STEP = 1e-3


def entropies_of(
    batch: Mapping[str, np.ndarray], scored: Bool[np.ndarray, "..."] | Integer[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Entropy in nats at the `scored` positions of rows from `Cache.read`.

    Without stored tokens it is that of the counts, which is too small for flat distributions.
    """
    if batch["topk_ids"].shape[-1]:
        return entropies(batch["topk_logprobs"][scored], batch["tail_logmass"][scored])
    counts = batch["counts"][scored].astype(np.float64)
    share = counts / counts.sum(1, keepdims=True)
    return -np.where(share > 0, share * np.log(np.maximum(share, 1e-30)), 0).sum(1)


def entropies(
    logprobs: Float[np.ndarray, "n k"], tail_logmass: Float[np.ndarray, "n nodes"]
) -> Float[np.ndarray, " n"]:
    """Entropy in nats of each stored distribution, its tail included.

    The tail adds −exp(A(1))·A'(1), because the derivative of a log-sum-exp is the mean exponent.
    The result is as exact as the nodes of A; where A is quantised, it is off by about 0.02 nats.
    """
    head, tail = logprobs.astype(np.float64), tail_logmass.astype(np.float64)
    with np.errstate(invalid="ignore"):
        of_head = -np.where(np.isfinite(head), np.exp(head) * head, 0).sum(1)
        last, before, first = (tail_logmass_at(tail, 1 - i * _STEP) for i in range(3))
        slope = (3 * last - 4 * before + first) / (2 * _STEP)
        of_tail = np.where(np.isfinite(last), -np.exp(last) * slope, 0)
    return of_head + of_tail
