"""Cutting a student out of a teacher: a subset of its blocks, everything else unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from decant.models.checkpoints.checkpoint import Checkpoint
from decant.models.config import ModelConfig
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


def spread_layers(count: int, config: ModelConfig) -> tuple[int, ...]:
    """The numbers of `count` blocks of a model, spread evenly.

    Of a model that repeats a period of several kinds of blocks, whole periods are spread, because
    its blocks were trained to follow each other so; only the first may lack its first blocks. So a
    student of a model with linear attention ends with full attention, as its source does.
    """
    total, period = config.num_layers, len(config.linear_layers)
    if period == 1 or total % period or period == total or not 1 <= count <= total:
        return evenly_spaced(count, total)
    periods = evenly_spaced(-(-count // period), total // period)
    return tuple(i for at in periods for i in range(at * period, (at + 1) * period))[-count:]


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
    homes = {
        layer: (name, place)
        for name, stack in source.config.stacks.items()
        for place, layer in enumerate(stack.layers)
    }
    for path, parameter in parameters_by_path(student).items():
        # Copies, not views: the student is trained while its source is still in use.
        stack, _, name = path.partition(".")
        axes = parameter.get_metadata()["axes"]
        if stack in config.stacks:
            own = [homes[layers[number]] for number in config.stacks[stack].layers]
            parameter.set_value(_blocks_of(source_parameters, own, name))
        elif "layers" in axes:  # what a parameter outside holds for each block
            array = source_parameters[path].get_value()
            parameter.set_value(jnp.take(array, np.asarray(layers), axis=axes.index("layers")))
        else:
            parameter.set_value(source_parameters[path].get_value().copy())
    return student


def _blocks_of(
    parameters: Mapping[str, nnx.Variable], blocks: Sequence[tuple[str, int]], name: str
) -> jax.Array:
    """The parameter `name` of blocks, each given by its stack and its place in it."""
    stacks = {stack for stack, _ in blocks}
    if len(stacks) == 1:
        array = parameters[f"{stacks.pop()}.{name}"].get_value()
        return array[np.asarray([place for _, place in blocks])]
    # Kinds of the source that are one in the student.
    return jnp.stack([parameters[f"{stack}.{name}"].get_value()[at] for stack, at in blocks])
