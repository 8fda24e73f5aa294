"""Attention maps as stored: bfloat16, or one byte per probability on a logarithmic scale.

A map [heads, query, key] holds probabilities that sum to one over the keys that a query sees, and
zeros elsewhere. Queries that no student learns from are all zero: padding, and masked tokens of
chats. `xp` is numpy or jax.numpy.
"""

from typing import Any

import numpy as np

_FLOOR = 16.0
"""−log of the smallest probability kept, 1.1e-7. A smaller probability is stored as zero."""
_STEPS = 254
_STEP = _FLOOR / _STEPS
"""Nats between neighbouring codes. The error of a probability is at most 3.2%."""


def encode_log(probabilities: Any, *, xp: Any = np) -> Any:
    """Codes uint8: 0 for a probability near zero, else probability ≈ exp(−(255 − code) · step)."""
    probabilities = probabilities.astype(xp.float32)
    positive = probabilities > 0
    logs = xp.log(xp.where(positive, probabilities, 1))
    codes = xp.clip(xp.round(logs / np.float32(_STEP)) + 255, 0, 255)
    return xp.where(positive, codes, 0).astype(xp.uint8)


def decode_log(codes: Any, *, xp: Any = np) -> Any:
    """Probabilities float32. Their sums over keys are one only within the codes' rounding."""
    codes = codes.astype(xp.float32)
    return xp.where(codes > 0, xp.exp((codes - 255) * np.float32(_STEP)), 0)
