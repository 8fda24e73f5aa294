"""Cutting a student out of a teacher: a subset of its blocks, everything else unchanged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flax import nnx

from decant.models.checkpoints.checkpoint import Checkpoint
from decant.models.decoder.decoder import Decoder
from decant.models.parameters import parameters_by_path


def evenly_spaced(count: int, total: int) -> tuple[int, ...]:
    """The numbers of `count` of `total` layers, evenly spaced, first and last included.

    ValueError unless 1 ≤ count ≤ total.

    >>> evenly_spaced(4, 10)
    (0, 3, 6, 9)
    """
    if not 1 <= count <= total:
        raise ValueError(
            f"cannot take {count} layers out of {total}; choose a number from 1 to {total}."
        )
    if count == 1:
        return (0,)
    return tuple((2 * i * (total - 1) + count - 1) // (2 * (count - 1)) for i in range(count))


def cut_layers(
    source: Decoder | Checkpoint,
    layers: Sequence[int],
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
) -> Decoder:
    """A decoder with the source's blocks `layers`, in this order; its arrays are copies.

    ValueError if `layers` is empty or names a block that does not exist.

    Args:
        source: a decoder, which keeps its dtypes, or a checkpoint, which is loaded.
        layers: numbers of blocks, from 0.
        dtype: of matrix products, if the source is a checkpoint.
        param_dtype: of weights, if the source is a checkpoint.
    """
    if isinstance(source, Checkpoint):
        source = source.load(dtype=dtype, param_dtype=param_dtype)
    total = source.config.num_layers
    wrong = [layer for layer in layers if not 0 <= layer < total]
    if wrong or not layers:
        raise ValueError(
            f"student layers {list(layers)}: {f'{wrong} do not exist' if wrong else 'none given'}; "
            f"the source has blocks 0 to {total - 1}."
        )
    config = source.config.with_layers(layers)
    student = nnx.eval_shape(
        lambda: Decoder(
            config, rngs=nnx.Rngs(0), dtype=source.dtype, param_dtype=source.param_dtype
        )
    )
    source_parameters = parameters_by_path(source)
    for path, parameter in parameters_by_path(student).items():
        array = source_parameters[path].get_value()
        # Copies, not views: the student is trained while its source is still in use.
        first = source.config.dense_layers
        if path.startswith("first_blocks."):
            array = array[np.asarray([layer for layer in layers if layer < first])]
        elif path.startswith("blocks."):
            array = array[np.asarray([layer - first for layer in layers if layer >= first])]
        else:
            array = array.copy()
        parameter.set_value(array)
    return student
