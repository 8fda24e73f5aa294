"""int8 weights: one byte per weight, one float32 scale per output channel of a matrix.

Only the blocks' matrices are quantised, which are nearly all of a large model. Norms, biases, the
router, the embedding and the head are not. A product sums over inputs, so a channel's scale can be
applied to the channel's sum.
"""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from decant.models.decoder.blocks import Blocks

MATRICES = (
    *("query", "key", "value", "output", "gate", "up", "down"),
    *("shared_gate", "shared_up", "shared_down"),
    *("query_latent", "latent", "turned_key", "output_gate"),
    *("linear_query", "linear_key", "linear_value", "linear_gate", "linear_output"),
)
SCALE = "_scale"
_STACKED = ("layers", "experts")
_LARGEST = 127


def abstract_int8(blocks: Blocks, inputs: dict[str, int]) -> None:
    """Replace the matrices of abstract blocks by abstract int8 matrices and their scales.

    `inputs`: matrix ("query") → how many axes, after those of layers and experts, are its input.
    """
    for name, count in inputs.items():
        if not hasattr(blocks, name):
            continue
        matrix = getattr(blocks, name)
        axes, shape = matrix.get_metadata()["axes"], matrix.get_value().shape
        kept = [i for i in range(len(axes)) if i not in input_axes(axes, inputs=count)]
        scales = jax.ShapeDtypeStruct(tuple(shape[i] for i in kept), np.float32)
        setattr(blocks, name + SCALE, nnx.Param(scales, axes=tuple(axes[i] for i in kept)))
        setattr(blocks, name, nnx.Param(jax.ShapeDtypeStruct(shape, np.int8), axes=axes))


def input_axes(axes: tuple[str, ...], *, inputs: int) -> tuple[int, ...]:
    """Indices of a matrix's input axes, over which its scales are taken.

    `axes` are the matrix's logical axes, and `inputs` counts its input axes.
    """
    stacked = sum(axis in _STACKED for axis in axes)
    return tuple(range(stacked, stacked + inputs))


def int8_scales(matrix: np.ndarray, *, over: tuple[int, ...]) -> np.ndarray:
    """Scales that map the largest magnitude over the axes `over` to 127; 1 where all are 0."""
    largest = np.abs(matrix).max(axis=over).astype(np.float32)
    return np.where(largest > 0, largest / np.float32(_LARGEST), np.float32(1))


def int8_codes(matrix: np.ndarray, scales: np.ndarray, *, over: tuple[int, ...]) -> np.ndarray:
    """The matrix as int8 multiples of `scales`, which lack the axes `over`."""
    return np.rint(matrix / np.expand_dims(scales, over)).astype(np.int8)
