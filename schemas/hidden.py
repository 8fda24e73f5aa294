"""Hidden states as they are stored: bfloat16, or int8 with one scale a position.

Written for numpy and jax.numpy alike (`xp`): capture encodes and training decodes on the device.
Positions of padding hold zeros.
"""

from typing import Any

import numpy as np

_LARGEST = 127


def encode_int8(states: Any, *, xp: Any = np) -> tuple[Any, Any]:
    """Codes int8 [..., D] and scales float32 [...]: state ≈ code · scale.

    The scale is the position's largest magnitude over 127, so that nothing clips.
    """
    states = states.astype(xp.float32)
    scale = xp.max(xp.abs(states), axis=-1) / np.float32(_LARGEST)
    safe = xp.where(scale > 0, scale, 1)
    codes = xp.clip(xp.round(states / safe[..., None]), -_LARGEST, _LARGEST)
    return codes.astype(xp.int8), scale


def decode_int8(codes: Any, scale: Any, *, xp: Any = np) -> Any:
    """States float32 [..., D] of codes and scales."""
    return codes.astype(xp.float32) * scale[..., None]
