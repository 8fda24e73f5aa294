"""Attention maps as they are stored: bfloat16, or one byte on a logarithmic scale.

A map [heads, query, key] holds probabilities that sum to one over the keys that a query sees; it is
zero elsewhere and in every row of a query that nothing is learned from: padding, and what is masked
in chats. Written for numpy and jax.numpy alike (`xp`).
"""

from typing import Any

import numpy as np

_FLOOR = 16.0
"""Nats below 1 of the smallest probability kept, 1.1e-7; what is below is stored as zero."""
_STEPS = 254
_STEP = _FLOOR / _STEPS
"""Nats between neighbouring codes: a probability is off by 3.2% at most."""


def encode_log(probabilities: Any, *, xp: Any = np) -> Any:
    """Codes uint8: 0 for (next to) nothing, else probability ≈ exp(−(255 − code) · step)."""
    probabilities = probabilities.astype(xp.float32)
    positive = probabilities > 0
    logs = xp.log(xp.where(positive, probabilities, 1))
    codes = xp.clip(xp.round(logs / np.float32(_STEP)) + 255, 0, 255)
    return xp.where(positive, codes, 0).astype(xp.uint8)


def decode_log(codes: Any, *, xp: Any = np) -> Any:
    """Probabilities float32. Rows then sum to one within the codes' rounding, not exactly."""
    codes = codes.astype(xp.float32)
    return xp.where(codes > 0, xp.exp((codes - 255) * np.float32(_STEP)), 0)
