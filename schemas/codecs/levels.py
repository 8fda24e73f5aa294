"""Levels: quantised log-probabilities, coarse where an error costs little.

An error ε at probability p costs about p(1−p)·ε²/2 of KL. The step at x = −log p is therefore
min(limit, cost / √(p(1−p))): every level costs the same KL, up to steps of `limit` nats. The limit
bounds the error for students that train at higher temperatures.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Integer

from decant.schemas.codecs.block import Tables

STEPS = (0.0072, 0.26)
"""Cost and limit of `quantiser` for new tables, in nats. At k = 64 and the worst T (about 1.4), the
mean KL is near 1e-4 nats and its 99th percentile near 2e-4."""
LEVEL_BITS = 12
MINUS_INFINITY = (1 << LEVEL_BITS) - 1
"""The level of log 0."""
_GRID = 2048
"""Cells per nat in the table from x to level."""


@dataclass(frozen=True, eq=False)
class Quantiser:
    """Conversion between log-probabilities and levels for one (cost, limit)."""

    knee: float
    """x in nats from which the step is `limit`."""
    limit: float
    level_of_cell: Integer[np.ndarray, " cells"]
    """Level of each cell of 1/2048 nat below the knee."""
    base: float
    """∫ dx/step from 0 to the knee."""
    logprob: Float[np.ndarray, " levels"]
    """The log-probability that each level decodes to, float32."""

    def levels(self, logprobs: Float[np.ndarray, "n k"]) -> Integer[np.ndarray, "n k"]:
        """Levels uint32 [n, k], monotonic in −logprob. ValueError for NaN."""
        x = np.maximum(-logprobs, np.float32(0))
        if not (x >= 0).all():
            raise ValueError("a log-probability is NaN; a row with NaN must not be encoded")
        cells = np.minimum(x * np.float32(_GRID), np.float32(len(self.level_of_cell) - 1))
        near = self.level_of_cell.take(cells.astype(np.int32), mode="clip")
        # Past the knee the integral is linear. Values too small for exp share the last level.
        far = np.float32(self.base - self.knee / self.limit + 0.5) + x * np.float32(1 / self.limit)
        far = np.minimum(far, np.float32(MINUS_INFINITY - 1)).astype(np.uint32)
        levels = np.where(x < np.float32(self.knee), near, far)
        infinite = np.isinf(x)
        if infinite.any():
            levels[infinite] = MINUS_INFINITY
        return levels


@lru_cache(maxsize=16)
def quantiser(cost: float, limit: float) -> Quantiser:
    """The quantiser with step(x) = min(limit, cost / √(p(1−p))), p = exp(−x)."""
    # √(p(1−p)) ≤ 1/2. Below p = 1/2 it falls with p; the knee is where the step reaches `limit`.
    ratio = min(cost / limit, 0.5)
    knee = -np.log((1 - np.sqrt(1 - 4 * ratio**2)) / 2)
    cells = int(np.ceil(knee * _GRID)) + 1
    x = np.arange(cells + 1) / _GRID
    p = np.exp(-x)
    density = np.maximum(1 / limit, np.sqrt(p * (1 - p)) / cost)
    integral = np.concatenate(([0], np.cumsum((density[1:] + density[:-1]) / 2 / _GRID)))
    base = float(np.interp(knee, x, integral))
    count = np.arange(MINUS_INFINITY)
    centres = np.where(count <= base, np.interp(count, integral, x), knee + (count - base) * limit)
    middle = (integral[1:] + integral[:-1]) / 2
    return Quantiser(
        knee=float(knee),
        limit=limit,
        level_of_cell=np.floor(middle + 0.5).astype(np.uint16),
        base=base,
        logprob=np.append(-centres, -np.inf).astype(np.float32),
    )


def quantiser_of(tables: Tables) -> Quantiser:
    """The quantiser that the tables were frozen with."""
    cost, limit = tables["steps"]
    return quantiser(float(cost), float(limit))
