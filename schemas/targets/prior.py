"""The tail prior: what a token's probability is on average where the teacher left it in the tail.

Kept as sums and counts over calibration positions, so that the priors of parts can be added:
    π_T(v) = Σ p_T(v) · [v in the tail]  /  Σ [v in the tail]
A loss that spreads a tail's mass in proportion to π, over that position's tail, gives each token
on average what the teacher gave it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Num

from decant.schemas.targets.targets import BETAS


@dataclass(frozen=True)
class TailPrior:
    """Sums and counts over positions.

    `sums` float64 [6, vocabulary]: Σ p_T(v) at the nodes β > 0 of `BETAS`, T = 1/β.
    `counts` [vocabulary]: positions whose tail holds v.
    """

    sums: Float[np.ndarray, "nodes vocabulary"]
    counts: Num[np.ndarray, " vocabulary"]

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored, by statistic name."""
        return {"tail-prior-sums": self.sums, "tail-prior-counts": self.counts}


SUMS, COUNTS = "tail-prior-sums.npy", "tail-prior-counts.npy"


def log_prior(priors: Sequence[TailPrior]) -> Float[np.ndarray, "nodes vocabulary"]:
    """log π in nats at all seven `BETAS` (float32), of several parts as one; not normalised.

    An id that no tail held, or whose probability vanished, gets the least of all others.
    """
    sums = np.sum([prior.sums for prior in priors], axis=0)
    counts = np.sum([prior.counts for prior in priors], axis=0)
    seen = (counts > 0) & (sums > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(seen, np.log(sums) - np.log(counts), np.inf)
    least = logs.min(axis=1, keepdims=True)
    logs = np.where(seen, logs, np.where(np.isfinite(least), least, 0))
    uniform = np.full((1, sums.shape[1]), -np.log(sums.shape[1]))
    assert BETAS[0] == 0
    return np.concatenate([uniform, logs]).astype(np.float32)
