"""The sketch: r numbers a position that give the shape of the teacher's tail at any T ≥ 1.

A teacher's logits are linear in its last hidden state h (after the final norm), up to an
elementwise cap: z = cap(h·W + bias). Calibration freezes, per part, a mean h̄ and a projection P
[D, r] onto the directions in which the softmax at T = 2 varies most. A position stores
c = (h − h̄)·P. A reader gets all logits back as
    ẑ_v = cap(b_v + Σ_i c_i·A_iv)
with b = h̄·W + bias and A [r, V], which are stored once per part. Only differences of ẑ within a
position have a meaning. The target at T keeps the stored head and the tail's exact mass t(T), and
shapes the tail like softmax(ẑ/T) restricted to it.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from decant.schemas.targets.targets import tail_logmass_at

MEAN, PROJECTION = "sketch-mean", "sketch-projection"
HEAD, BIAS = "sketch-head", "sketch-bias"
DEVIATIONS = "sketch-deviations"
NAMES = (MEAN, PROJECTION, HEAD, BIAS, DEVIATIONS)
"""Statistics of a part with a sketch."""


@dataclass(frozen=True, eq=False)
class SketchHead:
    """Turns sketches of one part into logits.

    `head` float32 [r, vocabulary] is A, `bias` float32 [vocabulary] is b. `softcap`: the teacher's
    logits are softcap·tanh(logits/softcap); None for no cap.
    """

    head: Float[np.ndarray, "r vocabulary"]
    bias: Float[np.ndarray, " vocabulary"]
    softcap: float | None = None

    def logits(self, sketch: Float[np.ndarray, "n r"]) -> Float[np.ndarray, "n vocabulary"]:
        """ẑ of each position, float32; up to a constant per position."""
        logits = sketch.astype(np.float32) @ self.head + self.bias
        if self.softcap is not None:
            logits = np.float32(self.softcap) * np.tanh(logits / np.float32(self.softcap))
        return logits


@dataclass(frozen=True, eq=False)
class SketchBasis:
    """What capture needs to make sketches, and readers to use them.

    `mean` float32 [D] is h̄, `projection` float32 [D, r] is P, `deviations` float64 [r] are the
    standard deviations of c's numbers on the calibration sample, largest first.
    """

    mean: Float[np.ndarray, " width"]
    projection: Float[np.ndarray, "width r"]
    head: SketchHead
    deviations: Float[np.ndarray, " r"]


def tail_logprobs(
    head: SketchHead,
    sketch: Float[np.ndarray, "n r"],
    *,
    topk_ids: Int[np.ndarray, "n k"],
    topk_logprobs: Float[np.ndarray, "n k"],
    tail_logmass: Float[np.ndarray, "n nodes"],
    temperature: float = 1.0,
) -> Float[np.ndarray, "n vocabulary"]:
    """Log-probabilities of all ids at T, the tail's included, of n positions: float64, in nats.

    All arrays are those of `Cache.read` at these positions, `head` is the cache's `sketch_head()`.
    The stored ids keep their log-probabilities at T; the tail has its stored mass and the sketch's
    shape. All −inf at a position without a target. [n, vocabulary] is large: take a few positions.

    ValueError for T < 1, where the tail's mass is not stored.
    """
    if not temperature >= 1:
        raise ValueError(f"temperature is {temperature}; a cache holds the tail's mass for T ≥ 1")
    beta, stored = 1 / temperature, np.isfinite(topk_logprobs)
    tail = beta * head.logits(sketch).astype(np.float64)
    at, slot = np.nonzero(stored)
    ids = topk_ids[at, slot]
    tail[at, ids] = -np.inf
    own = np.where(stored, beta * topk_logprobs.astype(np.float64), -np.inf)
    mass = tail_logmass_at(tail_logmass.astype(np.float64), beta)
    mass = np.where(stored.any(1), mass, -np.inf)
    whole = np.logaddexp(np.logaddexp.reduce(own, axis=1), mass)
    with np.errstate(invalid="ignore"):  # −inf − −inf: an empty tail, or no target
        share, missing = mass - whole, ~np.isfinite(mass)
        out = tail - np.logaddexp.reduce(tail, axis=1, keepdims=True) + share[:, None]
        out[missing] = -np.inf
        out[at, ids] = (own - whole[:, None])[at, slot]
    return out
