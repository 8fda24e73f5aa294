"""Normalise decoded targets, so that top-k and tail sum to one."""

import numpy as np
from jaxtyping import Float

from decant.schemas.targets.targets import BETAS

_BETAS = np.array(BETAS, np.float32)


def normalise(
    logprobs: Float[np.ndarray, "n k"],
    tail_logmass: Float[np.ndarray, "n 7"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`logprobs` and `tail_logmass` with Σ head + tail = 1, and the shift [n, 1] of log-probs.

    Every level has a small error, in the head as in the tail. One common factor is the correction
    of a least-squares fit and is safe for any tail mass. Keeping the tail and scaling the head is
    not safe: 1 − tail cancels when k is small.
    """
    # einsum takes a quarter of the time of .sum(1) for rows of this length.
    total = np.einsum("nk->n", np.exp(logprobs)) + np.exp(tail_logmass[:, -1])
    shift = np.log(np.where(total > 0, total, 1))[:, None]
    shift = shift.astype(np.float32)
    # Computed as [7, n], the tail's layout in memory; rows of seven would take several times as
    # long.
    return logprobs - shift, tail_logmass - (_BETAS[:, None] * shift.T).T, shift
