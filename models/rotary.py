"""Rotary positions: frequencies, their scaling for longer rows, and the rotation itself."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Divides every frequency by `factor`, as if positions stood closer together."""

    factor: float

    def apply(self, frequencies: np.ndarray) -> np.ndarray:
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

    def apply(self, frequencies: np.ndarray) -> np.ndarray:
        """The scaled frequencies, float32."""
        low, high = np.float32(self.low_freq_factor), np.float32(self.high_freq_factor)
        wavelengths = np.float32(2 * np.pi) / frequencies
        ratio = np.float32(self.original_max_positions) / wavelengths
        kept = np.clip((ratio - low) / (high - low), 0, 1)
        return (1 - kept) * frequencies / np.float32(self.factor) + kept * frequencies


Scaling = LinearScaling | Llama3Scaling


def frequencies(*, head_dim: int, theta: float, scaling: Scaling | None = None) -> np.ndarray:
    """Radians per position for each pair of coordinates, float32 [head_dim / 2].

    theta^(−2i/head_dim) for pair i, then `scaling`.
    """
    # Rounded as the weights were trained: a float32 power, then a float32 reciprocal. One unit
    # in the last place is up to 6e-5 radians at position 1,000.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.float64(theta) ** exponents.astype(np.float64)
    plain = np.float32(1) / powers.astype(np.float32)
    return plain if scaling is None else scaling.apply(plain)


def cos_and_sin(
    positions: Int[Array, "batch time"], frequencies: Float[np.ndarray, " half"]
) -> tuple[Float[Array, "batch time 1 half"], Float[Array, "batch time 1 half"]]:
    """Cosine and sine of position · frequency, the rotation that `rotate` takes."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch time heads head_dim"], rotation: tuple[Array, Array]
) -> Float[Array, "batch time heads head_dim"]:
    """Rotate each pair of coordinates (i, i + head_dim/2) by its angle, in float32."""
    cos, sin = rotation
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
