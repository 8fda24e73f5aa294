"""Decoded targets are distributions: head and tail sum to one, and no value is NaN.

The codecs check ids. Each check here is one pass over few numbers, and NaN fails it.
"""

import numpy as np
from jaxtyping import Float

from decant.schemas.targets.targets import Targets

_WITHIN = 0.01
"""Most that the sum of exact values may differ from one. Rounding makes less than 1e-3."""
_LEVEL = 0.2
"""Most nats that a codec moves the tail's mass, or a draw's log-probability."""


def total_mass(
    logprobs: Float[np.ndarray, "n k"], tail_logmass: Float[np.ndarray, "n nodes"]
) -> Float[np.ndarray, " n"]:
    """Head and tail of each position, summed."""
    with np.errstate(over="ignore", invalid="ignore"):  # damaged values
        # einsum takes a quarter of the time of .sum(1) for rows of this length.
        return np.einsum("nk->n", np.exp(logprobs)) + np.exp(tail_logmass[:, -1])


def require_total(total: Float[np.ndarray, " n"], *, within: float = _WITHIN) -> None:
    """ValueError unless the sum of each position is one."""
    if not (off := np.abs(total - 1).max()) <= within:
        raise ValueError(f"head and tail of a position do not sum to one: off by {off:.3g}")


def require_bounds(targets: Targets) -> Targets:
    """`targets`. ValueError if a tail's mass or a draw's probability is impossible."""
    # No tail has more mass at any β than it has ids.
    most, ids = targets.tail_logmass.max(), targets.tail_logmass[0, 0]
    if not most <= ids + _LEVEL:
        raise ValueError(f"a tail's log-mass is {most}, and {ids} at β = 0")
    if targets.draws and not (highest := targets.draws.logprobs.max()) <= _LEVEL:
        raise ValueError(f"a draw's log-probability is {highest}")
    return targets
