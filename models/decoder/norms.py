"""Norms: their parameters and their arithmetic, in float32."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from decant.models.config import ModelConfig
from decant.models.decoder.initializer import Initializer

BIAS = "_bias"


def add_norm(
    module: nnx.Module, name: str, *, new: Initializer, config: ModelConfig, **axes: int
) -> None:
    """Give `module` the parameters of a new norm: `name`, and `name`_bias if the kind has one."""
    setattr(module, name, (new.zeros if config.norm_adds_one else new.ones)(**axes))
    if config.norm == "layer":
        setattr(module, name + BIAS, new.zeros(**axes))


def norm_parameters(module: nnx.Module, name: str) -> tuple[Array, Array | None]:
    """Weight and bias of the norm called `name`; the bias is None if it has none."""
    bias = getattr(module, name + BIAS, None)
    return getattr(module, name)[...], None if bias is None else bias[...]


def norm(
    x: Float[Array, "..."],
    parameters: tuple[Float[Array, "..."], Float[Array, "..."] | None],
    *,
    config: ModelConfig,
    eps: float | None = None,
) -> Float[Array, "..."]:
    """The config's kind of norm, in float32, over as many of the last axes as the weight has.

    RMSNorm: x / √(mean x² + eps) · weight, or · (1 + weight). LayerNorm subtracts the mean of x
    first, and adds the bias last. `eps` None: the config's.
    """
    weight, bias = parameters
    axes = tuple(range(-weight.ndim, 0))
    x = x.astype(jnp.float32)
    if config.norm == "layer":
        x = x - jnp.mean(x, axis=axes, keepdims=True)
    if config.norm_adds_one:
        weight = 1 + weight.astype(jnp.float32)
    eps = config.norm_eps if eps is None else eps
    x = x * lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + eps) * weight
    return x if bias is None else x + bias
