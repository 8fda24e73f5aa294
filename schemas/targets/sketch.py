"""The sketch: r numbers a position that give the shape of the teacher's tail at any T ≥ 1.

A teacher's logits are linear in its last hidden state h (after the final norm), up to an
elementwise cap: z = cap(h·W + bias). Calibration freezes, per part, a mean h̄ and a projection P
[D, r] onto the directions in which the softmax at T = 2 varies most. A position stores
c = (h − h̄)·P. A reader gets all logits back as
    ẑ_v = cap(b_v + Σ_i c_i·A_iv)
with b = h̄·W + bias and A [r, V], which are stored once per part. Only differences of ẑ within a
position have a meaning. The target at T keeps the stored head and the tail's exact mass t(T), and
shapes the tail like softmax(ẑ/T) restricted to it.

What r numbers leave out of a logit varies around 0, but e to this power does not vary around 1: ids
whose logits are explained badly get too little. So b has an offset for each T: with it the tails of
the calibration sample, averaged, give every id what the teacher gives it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from decant.schemas.targets.targets import tail_logmass_at

MEAN, PROJECTION = "sketch-mean", "sketch-projection"
HEAD, BIAS = "sketch-head", "sketch-bias"
DEVIATIONS = "sketch-deviations"
OFFSETS = "sketch-offsets"
NAMES = (MEAN, PROJECTION, HEAD, BIAS, DEVIATIONS, OFFSETS)
"""Statistics of a part with a sketch. Offsets are absent before 0.11 and for rank "full"."""
OFFSET_BETAS = (0.25, 0.5, 1.0)
"""The β = 1/T that offsets are stored for. Others are interpolated linearly; at 0 they are 0."""


@dataclass(frozen=True, eq=False)
class SketchHead:
    """Turns sketches of one part into logits.

    `head` float32 [r, vocabulary] is A, `bias` float32 [vocabulary] is b. `softcap`: the teacher's
    logits are softcap·tanh(logits/softcap); None for no cap. `offsets` float32 [3, vocabulary] are
    b's, one for each of `OFFSET_BETAS`; None for none.
    """

    head: Float[np.ndarray, "r vocabulary"]
    bias: Float[np.ndarray, " vocabulary"]
    softcap: float | None = None
    offsets: Float[np.ndarray, "betas vocabulary"] | None = None

    def bias_at(self, temperature: float) -> Float[np.ndarray, " vocabulary"]:
        """b with its offset at T ≥ 1, float32."""
        if self.offsets is None:
            return self.bias
        weights = offset_weights(1 / temperature).astype(np.float32)
        return self.bias + weights @ self.offsets

    def logits(
        self, sketch: Float[np.ndarray, "n r"], *, temperature: float | None = None
    ) -> Float[np.ndarray, "n vocabulary"]:
        """ẑ of each position, float32; up to a constant per position.

        Without a temperature they estimate the teacher's logits. With one, their softmax at T
        estimates the teacher's.
        """
        bias = self.bias if temperature is None else self.bias_at(temperature)
        logits = sketch.astype(np.float32) @ self.head + bias
        if self.softcap is not None:
            logits = np.float32(self.softcap) * np.tanh(logits / np.float32(self.softcap))
        return logits


def offset_weights(beta: float) -> Float[np.ndarray, " betas"]:
    """The factor of each of the stored offsets at β."""
    known = (0.0, *OFFSET_BETAS)
    return np.array([np.interp(beta, known, one) for one in np.eye(len(known))[1:]])


def stacked_offsets(heads: Sequence[SketchHead]) -> Float[np.ndarray, "betas bases vocab"] | None:
    """The heads' offsets, 0 for a head without; None if no head has any."""
    if all(head.offsets is None for head in heads):
        return None
    none = np.zeros((len(OFFSET_BETAS), len(heads[0].bias)), np.float32)
    return np.stack([none if head.offsets is None else head.offsets for head in heads], axis=1)


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
    tail = beta * head.logits(sketch, temperature=temperature).astype(np.float64)
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
