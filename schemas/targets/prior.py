"""The tail prior π: a token's mean probability over the positions where it is in the tail.

Stored as sums and counts over calibration positions, so that the priors of parts can be added:
    π_T(v) = Σ p_T(v) · [v in the tail]  /  Σ [v in the tail]
A loss may spread a position's tail mass over that tail in proportion to π. On average each token
then gets the probability that the teacher gave it.
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
    `counts` [vocabulary]: number of positions whose tail holds v.
    """

    sums: Float[np.ndarray, "nodes vocabulary"]
    counts: Num[np.ndarray, " vocabulary"]

    def require_possible(self, vocabulary: int) -> None:
        """ValueError unless shapes fit `vocabulary` and no number is negative or NaN."""
        nodes = len(BETAS) - 1
        if self.sums.shape != (nodes, vocabulary) or self.counts.shape != (vocabulary,):
            raise ValueError(
                f"a tail prior of shapes {self.sums.shape} and {self.counts.shape}, expected "
                f"{(nodes, vocabulary)} and {(vocabulary,)}"
            )
        if not (np.isfinite(self.sums).all() and self.sums.min() >= 0 and self.counts.min() >= 0):
            raise ValueError("a tail prior with negative or infinite numbers")

    def arrays(self) -> dict[str, np.ndarray]:
        """The stored arrays, by statistic name."""
        return {"tail-prior-sums": self.sums, "tail-prior-counts": self.counts}


SUMS, COUNTS = "tail-prior-sums.npy", "tail-prior-counts.npy"


def log_prior(priors: Sequence[TailPrior]) -> Float[np.ndarray, "nodes vocabulary"]:
    """log π in nats at all seven `BETAS`, float32, pooled over `priors`; not normalised.

    An id that was in no tail, or whose probability underflowed, gets its node's smallest value.
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
