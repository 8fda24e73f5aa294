"""Hidden states as stored: bfloat16, or int8 with one scale per position.

`xp` is numpy or jax.numpy: capture encodes and training decodes on the device. Positions that no
student learns from hold zeros: padding, and masked tokens of chats.

A few coordinates of a transformer's residual stream are hundreds of times larger than the others.
With one scale for all coordinates, the others would get only a handful of codes. The int8 codes are
therefore of mixed states: an orthonormal transform spreads large coordinates over all coordinates
and keeps lengths and angles. It multiplies blocks of neighbouring coordinates by a Hadamard matrix,
then mixes the blocks by a cosine transform, which exists for any number of blocks.
"""

from functools import cache
from typing import Any

import numpy as np

_LARGEST = 127
_NEIGHBOURS = 64
"""Most coordinates in a block. A block's size is a power of two that divides the width."""


def encode_int8(states: Any, *, xp: Any = np) -> tuple[Any, Any]:
    """Codes int8 [..., D] and scales float32 [...]: mixed state ≈ code · scale.

    The scale is the position's largest mixed magnitude divided by 127, so that nothing clips.
    """
    mixed = _mix(states.astype(xp.float32), xp=xp)
    scale = xp.max(xp.abs(mixed), axis=-1) / np.float32(_LARGEST)
    safe = xp.where(scale > 0, scale, 1)
    codes = xp.clip(xp.round(mixed / safe[..., None]), -_LARGEST, _LARGEST)
    return codes.astype(xp.int8), scale


def decode_int8(codes: Any, scale: Any, *, xp: Any = np) -> Any:
    """States float32 [..., D] from codes [..., D] and scales [...]."""
    return _mix(codes.astype(xp.float32), back=True, xp=xp) * scale[..., None]


def _mix(states: Any, *, back: bool = False, xp: Any) -> Any:
    """The mixed states [..., D] of `states`, or with `back` the states of mixed ones."""
    width = states.shape[-1]
    size = min(width & -width, _NEIGHBOURS)
    across = _cosines(width // size)
    # Accelerators would round float32 operands; numpy's matmul has no precision argument.
    exact = {} if xp is np else {"precision": "highest"}
    blocks = states.reshape(*states.shape[:-1], width // size, size)
    mixed = xp.matmul(blocks, _hadamard(size), **exact)  # symmetric: its own inverse
    mixed = xp.matmul(across.T if back else across, mixed, **exact)
    return mixed.reshape(states.shape)


@cache
def _hadamard(order: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(np.float32(order))


@cache
def _cosines(order: int) -> np.ndarray:
    """The orthonormal DCT-II, row k: cos(π·k·(j + ½) / order), scaled."""
    k, j = np.ogrid[:order, :order]
    matrix = np.cos(np.pi * k * (j + 0.5) / order) * np.sqrt(2 / order)
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)
