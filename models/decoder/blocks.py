"""The decoder's blocks: attention, then a gated MLP or experts, added to the residual stream."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, DTypeLike, Float, Int

from decant.models.config import ModelConfig
from decant.models.decoder.attention import attend
from decant.models.decoder.experts import choose_experts, mixture_of_experts
from decant.models.decoder.initializer import Initializer
from decant.models.mesh.execution import PRODUCTS
from decant.models.numerics import contract
from decant.models.rotary import rotate

Rotations = list[tuple[Array, Array]]
"""Cosines and sines that rotate queries and keys: one pair for all blocks, or a second pair for the
blocks that have a window."""


class BlockPattern(NamedTuple):
    """Settings that differ between blocks: [layers] arrays, or scalars inside a scan or by index.

    A field is None if no block of this model uses it; the compiled program omits it.
    """

    window: Array | None
    """int [*layers]: how many positions a query sees, itself included."""
    local_rotation: Array | None
    """bool [*layers]: whether the block uses the second of two rotations."""


class Blocks(nnx.Module):
    """All blocks, their parameters stacked along a leading `layers` axis.

    Its methods run one block: they need an object that holds one block's slice of each parameter.
    """

    def __init__(self, config: ModelConfig, *, new: Initializer, dtype: DTypeLike):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        c, layers = config, config.num_layers
        into = {"layers": layers, "embed": c.hidden_size}
        heads = {"heads": c.num_heads, "head_dim": c.head_dim}
        kv = {"kv_heads": c.num_kv_heads, "head_dim": c.head_dim}
        experts = {"experts": c.num_experts} if c.num_experts else {}
        wide, narrow = {"mlp": c.intermediate_size}, {"embed": c.hidden_size}
        # Each block adds twice to the residual stream; this scale keeps the sum's size.
        residual_scale = (2 * layers) ** -0.5
        unit = new.zeros if c.norm_adds_one else new.ones
        each = {"layers": layers, "norm": c.hidden_size}
        self.attention_norm = unit(**each)
        self.query = new.normal(**into, **heads)
        self.key = new.normal(**into, **kv)
        self.value = new.normal(**into, **kv)
        if c.qkv_bias:
            self.query_bias = new.zeros(layers=layers, **heads)
            self.key_bias = new.zeros(layers=layers, **kv)
            self.value_bias = new.zeros(layers=layers, **kv)
        if c.qk_norm:
            self.query_norm = unit(layers=layers, head_dim=c.head_dim)
            self.key_norm = unit(layers=layers, head_dim=c.head_dim)
        self.output = new.normal(layers=layers, **heads, **narrow, scale=residual_scale)
        self.mlp_norm = unit(**each)
        if c.post_norms:
            self.attention_post_norm = unit(**each)
            self.mlp_post_norm = unit(**each)
        if c.num_experts:
            self.router = new.normal(**into, **experts)
        self.gate = new.normal(layers=layers, **experts, **narrow, **wide)
        self.up = new.normal(layers=layers, **experts, **narrow, **wide)
        self.down = new.normal(layers=layers, **experts, **wide, **narrow, scale=residual_scale)

    def __call__(
        self,
        x: Float[Array, "batch time embed"],
        segment_ids: Int[Array, "batch time"],
        rotations: Rotations,
        pattern: BlockPattern,
    ) -> Float[Array, "batch time embed"]:
        """The residual stream after one block, float32; `pattern` holds that block's scalars."""
        mixed = self.attention(self.normed(x, self.attention_norm), segment_ids, rotations, pattern)
        if self.config.post_norms:
            mixed = norm(mixed, self.attention_post_norm[...], config=self.config)
        x = x + mixed
        passed = self.mlp(self.normed(x, self.mlp_norm))
        if self.config.post_norms:
            passed = norm(passed, self.mlp_post_norm[...], config=self.config)
        return x + passed

    def project(self, equation: str, x: Array, name: str) -> Array:
        """The einsum of activations with the parameter called `name`, in float32."""
        product = contract(equation, x, getattr(self, name)[...])
        # int8 weights have scales, see checkpoints/quantization.py.
        scales = getattr(self, f"{name}_scale", None)
        if scales is None:
            return product
        matrix, out = equation.split(",")[1].split("->")
        channels = "".join(axis for axis in matrix if axis in out)
        return jnp.einsum(f"{out},{channels}->{out}", product, scales[...])

    def normed(self, x: Array, weight: nnx.Param) -> Array:
        """`norm` of x, cast to the dtype of the matrix products that follow."""

        def cast(x: Array, weight: Array) -> Array:
            return norm(x, weight, config=self.config).astype(self.dtype)

        # Training keeps only x, which the residual stream keeps anyway.
        return jax.checkpoint(cast, prevent_cse=False)(x, weight[...])

    @property
    def scale(self) -> float:
        """The factor of attention scores."""
        c = self.config
        return (c.head_dim if c.query_scalar is None else c.query_scalar) ** -0.5

    def attention(
        self, x: Array, segment_ids: Array, rotations: Rotations, pattern: BlockPattern
    ) -> Array:
        """Grouped-query attention with rotary positions, of normed states; float32."""
        q, k = self.queries_and_keys(x, rotations, pattern)
        v = self.project("btd,dhk->bthk", x, "value")
        if self.config.qkv_bias:
            v = v + self.value_bias[...]
        mixed = attend(
            checkpoint_name(q, PRODUCTS),
            checkpoint_name(k, PRODUCTS),
            checkpoint_name(v.astype(self.dtype), PRODUCTS),
            segment_ids,
            pattern.window,
            scale=self.scale,
            softcap=self.config.attention_softcap,
        )
        return self.project("bthk,hkd->btd", mixed, "output")

    def queries_and_keys(
        self, x: Array, rotations: Rotations, pattern: BlockPattern
    ) -> tuple[Array, Array]:
        """Queries and keys of normed states, rotated by position.

        Shapes: [batch, time, heads, head_dim] and [batch, time, kv_heads, head_dim].
        """
        q = self.project("btd,dhk->bthk", x, "query")
        k = self.project("btd,dhk->bthk", x, "key")
        if self.config.qkv_bias:
            q, k = q + self.query_bias[...], k + self.key_bias[...]
        if self.config.qk_norm:
            q = norm(q, self.query_norm[...], config=self.config)
            k = norm(k, self.key_norm[...], config=self.config)
        rotation, local = rotations[0], pattern.local_rotation
        if local is not None:
            rotation = jax.tree.map(lambda a, b: jnp.where(local, b, a), *rotations)
        return rotate(q, rotation).astype(self.dtype), rotate(k, rotation).astype(self.dtype)

    def mlp(self, x: Array) -> Array:
        """The gated MLP, or a mixture of those that each token's router chooses; float32."""
        c = self.config
        if not c.num_experts:
            return self.gated_mlp(x, into="btd,df->btf", out="btf,fd->btd")
        scores = self.project("btd,de->bte", x, "router")
        ids, weights = choose_experts(
            scores, count=c.experts_per_token, normalise=c.normalise_experts
        )

        def every_expert(slots: Array) -> Array:
            out = self.gated_mlp(slots, into="ebsd,edf->ebsf", out="ebsf,efd->ebsd")
            return out.astype(self.dtype)

        return mixture_of_experts(x, ids, weights, num_experts=c.num_experts, expert=every_expert)

    def gated_mlp(self, x: Array, *, into: str, out: str) -> Array:
        """down(activation(gate(x)) · up(x)), float32.

        `into` is the einsum equation of gate and up, `out` that of down.
        """
        gate, up = self.project(into, x, "gate"), self.project(into, x, "up")
        product = gated_product(gate, up, activation=self.config.activation, dtype=self.dtype)
        return self.project(out, product, "down")


def gated_product(
    gate: Float[Array, "*axes mlp"],
    up: Float[Array, "*axes mlp"],
    *,
    activation: Literal["silu", "gelu_tanh"],
    dtype: DTypeLike,
) -> Float[Array, "*axes mlp"]:
    """activation(gate) · up, computed in float32 and returned in `dtype`.

    The backward pass keeps only the two arguments, in `dtype`. They are the widest arrays of a
    block, and JAX would keep five such arrays in float32.
    """
    return _gated_product(gate, up, activation, jnp.dtype(dtype))


def _gated_product_float32(gate: Array, up: Array, activation: str) -> Array:
    product = nnx.silu(gate) if activation == "silu" else nnx.gelu(gate, approximate=True)
    return product * up


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gated_product(gate: Array, up: Array, activation: str, dtype: jnp.dtype) -> Array:
    return _gated_product_float32(gate, up, activation).astype(dtype)


def _gated_product_forward(gate: Array, up: Array, activation: str, dtype: jnp.dtype) -> Any:
    kept = tuple(checkpoint_name(x.astype(dtype), PRODUCTS) for x in (gate, up))
    return _gated_product(gate, up, activation, dtype), kept


def _gated_product_backward(activation: str, _dtype: jnp.dtype, kept: Any, gradient: Array) -> Any:
    wide = (x.astype(jnp.float32) for x in kept)
    _, pull = jax.vjp(partial(_gated_product_float32, activation=activation), *wide)
    return pull(gradient.astype(jnp.float32))


_gated_product.defvjp(_gated_product_forward, _gated_product_backward)


def norm(
    x: Float[Array, "*axes width"], weight: Float[Array, " width"], *, config: ModelConfig
) -> Float[Array, "*axes width"]:
    """RMSNorm, x / √(mean x² + eps) · weight, or · (1 + weight); in float32."""
    x = x.astype(jnp.float32)
    if config.norm_adds_one:
        weight = 1 + weight.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps) * weight
