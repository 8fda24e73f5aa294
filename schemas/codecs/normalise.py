"""Normalise decoded targets, so that top-k and tail sum to one."""

import numpy as np
from jaxtyping import Float

from decant.schemas.codecs.distributions import require_total, total_mass
from decant.schemas.targets.targets import BETAS

_BETAS = np.array(BETAS, np.float32)
_WITHIN = 0.25
"""Most that the sum may differ from one; every level is off by half a step."""


def normalise(
    logprobs: Float[np.ndarray, "n k"],
    tail_logmass: Float[np.ndarray, "n 7"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`logprobs` and `tail_logmass` with Σ head + tail = 1, and the shift [n, 1] of log-probs.

    Every level has a small error, in the head as in the tail. One common factor is the correction
    of a least-squares fit and is safe for any tail mass. Keeping the tail and scaling the head is
    not safe: 1 − tail cancels when k is small. ValueError if the sum is far from one.
    """
    total = total_mass(logprobs, tail_logmass)
    require_total(total, within=_WITHIN)
    shift = np.log(total)[:, None]
    # Computed as [7, n], the tail's layout in memory; rows of seven would take several times as
    # long.
    return logprobs - shift, tail_logmass - (_BETAS[:, None] * shift.T).T, shift
