"""Activations of MLPs, which keep little for the backward pass."""

from functools import partial
from statistics import NormalDist
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, DTypeLike, Float

from decant.models.mesh.execution import PRODUCTS

Activation = Literal["silu", "gelu_tanh", "gelu", "clamped_swish"]
# Of gpt-oss, as its weights were trained.
_SLOPE, _LIMIT = 1.702, 7.0


def activated(
    gate: Float[Array, "*axes mlp"],
    up: Float[Array, "*axes mlp"] | None = None,
    *,
    activation: Activation,
    dtype: DTypeLike,
) -> Float[Array, "*axes mlp"]:
    """activation(gate) · up, or activation(gate) alone; in float32, returned in `dtype`.

    "clamped_swish" is g · sigmoid(1.702·g) · (1 + u) with g = min(gate, 7) and u within ±7.

    The backward pass keeps only the arguments, in `dtype`. They are the widest arrays of a
    block, and JAX would keep five such arrays in float32.
    """
    return _activated((gate,) if up is None else (gate, up), activation, jnp.dtype(dtype))


def cutoff(sparsity: float) -> float:
    """How many standard deviations above the mean a share `sparsity` of a normal distribution ends.

    −∞ for a share of 0.
    """
    return NormalDist().inv_cdf(sparsity) if sparsity else float("-inf")


@partial(jax.checkpoint, prevent_cse=False)
def above_cutoff(
    gate: Float[Array, "*axes mlp"], deviations: Float[Array, ""]
) -> Float[Array, "*axes mlp"]:
    """relu(gate − mean − deviations · standard deviation) along the last axis.

    If `deviations` is −∞, the gate itself.
    """
    sparse = jnp.isfinite(deviations)
    mean = jnp.mean(gate, axis=-1, keepdims=True)
    variance = jnp.mean((gate - mean) ** 2, axis=-1, keepdims=True)
    # The root has no gradient at 0, which is reached if all gates are equal.
    spread = jnp.sqrt(jnp.maximum(variance, jnp.finfo(jnp.float32).tiny))
    least = mean + spread * jnp.where(sparse, deviations, 0)
    return jnp.where(sparse, nnx.relu(gate - least), gate)


def _activated_float32(inputs: tuple[Array, ...], activation: Activation) -> Array:
    gate, *up = inputs
    if activation == "clamped_swish":
        gate = jnp.minimum(gate, _LIMIT)
        product = gate * nnx.sigmoid(_SLOPE * gate)
        up = [1 + jnp.clip(value, -_LIMIT, _LIMIT) for value in up]
    elif activation == "silu":
        product = nnx.silu(gate)
    else:
        product = nnx.gelu(gate, approximate=activation == "gelu_tanh")
    return product * up[0] if up else product


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _activated(inputs: tuple[Array, ...], activation: Activation, dtype: jnp.dtype) -> Array:
    return _activated_float32(inputs, activation).astype(dtype)


def _activated_forward(inputs: tuple[Array, ...], activation: Activation, dtype: jnp.dtype) -> Any:
    kept = tuple(checkpoint_name(x.astype(dtype), PRODUCTS) for x in inputs)
    return _activated(inputs, activation, dtype), kept


def _activated_backward(
    activation: Activation, _dtype: jnp.dtype, kept: Any, gradient: Array
) -> Any:
    wide = tuple(x.astype(jnp.float32) for x in kept)
    _, pull = jax.vjp(partial(_activated_float32, activation=activation), wide)
    return pull(gradient.astype(jnp.float32))


_activated.defvjp(_activated_forward, _activated_backward)
