"""AltUp: several copies of the residual stream, of which blocks work on the first.

Before a block, each copy is predicted from all copies. After it, each is corrected by the block's
change of the first. So the stream is wider and blocks are not. Copies are an axis after time, so
that rows stay the first axis: [batch, time, copies, embed].

Source: Baykal et al., "Alternating Updates for Efficient Transformers", as Gemma 3n has it.
"""

from typing import Any, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

from decant.models.decoder.initializer import Initializer
from decant.models.decoder.norms import norm, norm_parameters
from decant.models.mesh.execution import Execution
from decant.models.numerics import contract

# Their modules import this one.
Blocks: TypeAlias = Any
Decoder: TypeAlias = Any

_PROJECTION = ("other_copies", "embed", "norm")
_LEAST_MEAN_SQUARE = 1e-5


def add_projections(decoder: Decoder, *, new: Initializer) -> None:
    """Give a decoder the maps from the embedding to the other copies, and back at the end."""
    c = decoder.config
    shape = dict(zip(_PROJECTION, (c.stream_copies - 1, c.hidden_size, c.hidden_size), strict=True))
    decoder.copy_projection = new.normal(**shape)
    decoder.copy_return = new.normal(**shape)


def add_coefficients(block: Blocks, *, new: Initializer) -> None:
    """Give blocks what predicts and corrects copies; `copy_router_norm` is added elsewhere."""
    c, layers = block.config, {"layers": block.config.num_layers}
    routed = layers | {"modalities": c.stream_copies}
    copies = {"copies": c.stream_copies}
    block.copy_router = new.normal(**layers, embed=c.hidden_size, **copies)
    block.prediction = new.normal(**routed, **copies, other_copies=c.stream_copies)
    block.correction = new.normal(**routed, **copies)
    if c.layer_input_dim:  # called a bias because it has no weight decay either
        block.copy_factor_bias = new.ones(**layers, norm=c.hidden_size)


def spread(
    decoder: Decoder, x: Float[Array, "batch time embed"], execution: Execution
) -> Float[Array, "batch time copies embed"]:
    """The embedding, and maps of it that are as large as it is."""
    matrix = _gathered(decoder, decoder.copy_projection[...], execution)
    others = contract("btd,cde->btce", x.astype(decoder.dtype), matrix)
    first = x[:, :, None]
    return jnp.concatenate([first, _as_large_as(first, others)], axis=2)


def merge(
    decoder: Decoder, copies: Float[Array, "batch time copies embed"], execution: Execution
) -> Float[Array, "batch time embed"]:
    """The mean of the first copy and of maps of the others that are as large as it is."""
    matrix = _gathered(decoder, decoder.copy_return[...], execution)
    others = contract("btcd,cde->btce", copies[:, :, 1:].astype(decoder.dtype), matrix)
    first = copies[:, :, :1]
    return jnp.mean(jnp.concatenate([first, _as_large_as(first, others)], axis=2), axis=2)


def predict(
    block: Blocks, copies: Float[Array, "batch time copies embed"]
) -> Float[Array, "batch time copies embed"]:
    """Each copy plus a sum of all, weighted by what the token's first copy is."""
    weights = block.project("btm,mcs->btcs", _modalities(block, copies[:, :, 0]), "prediction")
    return copies + contract("btcs,btsd->btcd", weights, copies)


def correct(
    block: Blocks,
    predicted: Float[Array, "batch time copies embed"],
    x: Float[Array, "batch time embed"],
    layer_input: Float[Array, "batch time width"] | None,
) -> Float[Array, "batch time copies embed"]:
    """The predicted copies after the block has made `x` of the first.

    To each its share of the change is added, and to all but the first what the block's own input of
    each token adds.
    """
    shares = 1 + block.project("btm,mc->btc", _modalities(block, x), "correction")
    copies = predicted + shares[..., None] * (x - predicted[:, :, 0])[:, :, None]
    if layer_input is None:
        return copies
    scaled = copies[:, :, 0] * block.copy_factor_bias[...].astype(jnp.float32)
    return copies.at[:, :, 1:].add(block.from_layer_input(scaled, layer_input)[:, :, None])


def _modalities(block: Blocks, x: Array) -> Array:
    """What a token is, as the router sees it: a number from −1 to 1 for each copy."""
    normed = norm(x, norm_parameters(block, "copy_router_norm"), config=block.config)
    routed = (normed / block.config.hidden_size).astype(block.dtype)
    return jnp.tanh(block.project("btd,dm->btm", routed, "copy_router")).astype(block.dtype)


def _as_large_as(first: Array, others: Array) -> Array:
    """`others` with the root mean square of `first`, along the last axis."""
    target = jnp.sqrt(jnp.mean(first**2, axis=-1, keepdims=True))
    mean_square = jnp.mean(others**2, axis=-1, keepdims=True)
    return others * target / jnp.sqrt(jnp.maximum(mean_square, _LEAST_MEAN_SQUARE))


def _gathered(decoder: Decoder, matrix: Array, execution: Execution) -> Array:
    return execution.gather_matrix(matrix, _PROJECTION, dtype=decoder.dtype)
