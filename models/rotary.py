"""Rotary positions: frequencies, their scaling for longer rows, and the rotation itself.

A scaling is a function of the row's length, never of the documents in it: rows of one length are
all turned alike, whatever is packed in them.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Divides every frequency by `factor`, as if positions stood closer together."""

    factor: float

    def apply(self, frequencies: np.ndarray, *, theta: float, length: int) -> np.ndarray:
        """The scaled frequencies, float32."""
        return frequencies / np.float32(self.factor)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: only frequencies with long wavelengths are divided.

    With r = original_max_positions / wavelength, a frequency with r ≥ high_freq_factor is kept and
    one with r ≤ low_freq_factor is divided by `factor`. Between them the result is a mix of both
    that is linear in r.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def apply(self, frequencies: np.ndarray, *, theta: float, length: int) -> np.ndarray:
        """The scaled frequencies, float32."""
        low, high = np.float32(self.low_freq_factor), np.float32(self.high_freq_factor)
        wavelengths = np.float32(2 * np.pi) / frequencies
        ratio = np.float32(self.original_max_positions) / wavelengths
        kept = np.clip((ratio - low) / (high - low), 0, 1)
        return (1 - kept) * frequencies / np.float32(self.factor) + kept * frequencies


@dataclasses.dataclass(frozen=True)
class DynamicScaling:
    """Dynamic NTK: a larger base for rows longer than `original_max_positions`.

    With s = factor · length / original_max_positions − (factor − 1), the base becomes
    theta · s^(d/(d−2)) for d turned coordinates. Shorter rows are turned as without a scaling.
    """

    factor: float
    original_max_positions: int

    def apply(self, frequencies: np.ndarray, *, theta: float, length: int) -> np.ndarray:
        """The scaled frequencies, float32."""
        longer = max(length, self.original_max_positions) / self.original_max_positions
        stretch = self.factor * longer - (self.factor - 1)
        pairs = len(frequencies)
        # (theta · s^(d/(d−2)))^(−2i/d) = theta^(−2i/d) · s^(−i/(d/2 − 1))
        shrunk = np.float64(stretch) ** (-np.arange(pairs) / max(pairs - 1, 1))
        return (frequencies * shrunk).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN: pairs that turn slowly are divided by `factor`, fast ones kept, a ramp between them.

    The ramp runs over the pairs' numbers, from the pair that turns beta_fast times in
    original_max_positions to the one that turns beta_slow times. Source: arXiv 2309.00071.
    """

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """The ramp's ends are whole numbers, rounded outwards."""
    attention_factor: float = 1.0
    """Factor of turned queries and of turned keys."""

    def apply(self, frequencies: np.ndarray, *, theta: float, length: int) -> np.ndarray:
        """The scaled frequencies, float32."""
        pairs = len(frequencies)

        def pair_that_turns(times: float) -> float:
            distance = self.original_max_positions / (times * 2 * math.pi)
            return pairs * math.log(distance) / math.log(theta)

        first, last = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        last += 0.001 if first == last else 0
        ramp = np.clip((np.arange(pairs, dtype=np.float32) - first) / (last - first), 0, 1)
        return frequencies / np.float32(self.factor) * ramp + frequencies * (1 - ramp)


@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE: a divisor for each pair, other ones for rows beyond original_max_positions.

    Source: arXiv 2402.13753.
    """

    short_factors: tuple[float, ...]
    """Divisors of the frequencies in rows of up to original_max_positions, one a pair."""
    long_factors: tuple[float, ...]
    """The same in longer rows."""
    original_max_positions: int
    attention_factor: float = 1.0
    """Factor of turned queries and of turned keys, in rows of every length."""

    def apply(self, frequencies: np.ndarray, *, theta: float, length: int) -> np.ndarray:
        """The scaled frequencies, float32."""
        long = length > self.original_max_positions
        factors = self.long_factors if long else self.short_factors
        return frequencies / np.array(factors, np.float32)


@dataclasses.dataclass(frozen=True)
class ProportionalScaling:
    """Gemma 4's: only the first pairs turn, with the frequencies that they have in a whole head.

    So the pairs are (i, i + half of the head), unlike those of `ModelConfig.rotary_dim`.
    """

    share: float
    """⌊share · pairs⌋ pairs turn."""

    def apply(self, frequencies: np.ndarray, *, theta: float, length: int) -> np.ndarray:
        """The scaled frequencies, float32; 0 for pairs that stay."""
        turning = int(self.share * 2 * len(frequencies) // 2)
        return np.where(np.arange(len(frequencies)) < turning, frequencies, np.float32(0))


Scaling = (
    LinearScaling
    | Llama3Scaling
    | DynamicScaling
    | YarnScaling
    | LongRopeScaling
    | ProportionalScaling
)


def frequencies(
    *, head_dim: int, theta: float, scaling: Scaling | None = None, length: int = 1
) -> np.ndarray:
    """Radians per position for each pair of coordinates, float32 [head_dim / 2].

    theta^(−2i/head_dim) for pair i, then `scaling` for rows of `length` tokens, padding included.
    """
    # Rounded as the weights were trained: a float32 power, then a float32 reciprocal. One unit
    # in the last place is up to 6e-5 radians at position 1,000.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.float64(theta) ** exponents.astype(np.float64)
    plain = np.float32(1) / powers.astype(np.float32)
    return plain if scaling is None else scaling.apply(plain, theta=theta, length=length)


def attention_factor(scaling: Scaling | None) -> float:
    """The factor of turned queries and of turned keys."""
    return getattr(scaling, "attention_factor", 1.0)


def usual_attention_factor(scaling_factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention factor for a scaling of that factor: 0.1 · mscale · ln factor + 1."""
    return 1.0 if scaling_factor <= 1 else 0.1 * mscale * math.log(scaling_factor) + 1.0


def cos_and_sin(
    positions: Int[Array, "batch time"],
    frequencies: Float[np.ndarray, " half"],
    *,
    factor: float = 1.0,
) -> tuple[Float[Array, "batch time 1 half"], Float[Array, "batch time 1 half"]]:
    """factor · cosine and sine of position · frequency, the rotation that `rotate` takes."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def grown(
    positions: Int[Array, "batch time"], beta: float, length: int
) -> Float[Array, "batch time 1 1"]:
    """1 + β·ln(1 + ⌊position/length⌋): the factor of queries far from the document's beginning."""
    return (1 + beta * jnp.log1p(positions // length))[:, :, None, None]


def rotate(
    x: Float[Array, "batch time heads head_dim"],
    rotation: tuple[Array, Array],
    *,
    neighbours: bool = False,
) -> Float[Array, "batch time heads head_dim"]:
    """Rotate each pair of coordinates (i, i + half) by its angle, in float32.

    A rotation of `half` angles turns the first 2 · half coordinates; the rest stay as they are.
    With `neighbours` the pairs are (2i, 2i + 1). Their results are at i and i + half all the same:
    products of queries and keys do not depend on the order of coordinates.
    """
    cos, sin = rotation
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    if neighbours:
        first, second = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1)
