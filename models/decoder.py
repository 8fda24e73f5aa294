"""The decoder: embedding, L equal blocks of attention and gated MLP, a final norm, a head.

Blocks are stacked: each parameter carries a leading `layers` axis and the forward pass
scans over it. Against 30 unrolled blocks this runs as fast and compiles in less than half
the time. Norms, softmax and the residual stream are float32; matrix products take operands
in `dtype` and sum in float32.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int, Shaped

from models.attention import attend, maps
from models.config import ModelConfig
from models.numerics import contract

# Batches come as they were read; everything inside is a jax array.
Rows = Array | np.ndarray


class Decoder(nnx.Module):
    """A decoder-only language model of the Llama family, up to its final hidden states.

    `dtype` is what matrix products take; `param_dtype` is how weights are kept.
    Every parameter has `axes` metadata: its logical axis names, see `models.sharding`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.param_dtype = jnp.dtype(param_dtype)
        new = _Initializer(rngs, self.param_dtype)
        c = config
        self.embedding = new.normal(vocab=c.vocab_size, embed=c.hidden_size)
        self.blocks = Blocks(config, new=new, dtype=self.dtype)
        self.final_norm = new.ones(embed=c.hidden_size)
        if not c.tie_embeddings:
            self.head = new.normal(embed=c.hidden_size, vocab=c.vocab_size)

    def __call__(
        self,
        tokens: Int[Rows, "batch time"],
        segment_ids: Int[Rows, "batch time"],
        positions: Int[Rows, "batch time"],
        *,
        hidden_layers: Sequence[int] = (),
    ) -> tuple[Float[Array, "batch time embed"], dict[int, Float[Array, "batch time embed"]]]:
        """Hidden states after the final norm, in `dtype`, and those of the chosen layers.

        Layer 0 is the embedding's output, layer i the output of the i-th block, both in float32 as
        the next block reads them; layer L (also −1) is the states after the final norm.
        """
        tokens, segment_ids, positions = map(jnp.asarray, (tokens, segment_ids, positions))
        last = self.config.num_layers
        wanted = self._numbered(hidden_layers)
        x = self.embedding[...][tokens].astype(jnp.float32)
        chosen = {0: x} if 0 in wanted else {}
        turn = self._turn(positions)

        inner = [layer for layer in wanted if 0 < layer < last]
        x, kept = self._through_blocks(x, segment_ids, turn, keep=inner)
        chosen |= zip(inner, kept, strict=True)

        x = rms_norm(x, self.final_norm[...], eps=self.config.norm_eps).astype(self.dtype)
        if last in wanted:
            chosen[last] = x
        return x, chosen

    def attention_maps(
        self,
        states: Float[Array, "batch time embed"],
        segment_ids: Int[Rows, "batch time"],
        positions: Int[Rows, "batch time"],
        *,
        layer: int | Array,
        heads: Sequence[int] | None = None,
        keep: Callable[[Array], Array] | None = None,
    ) -> Shaped[Array, "batch chosen time time"]:
        """Attention probabilities of block `layer` (from 0), [batch, head, query, key], float32.

        `states` are the block's input, hidden layer `layer` as `__call__` returns it; only queries
        and keys are computed again, so that the forward pass keeps its fast attention. `heads`
        chooses heads and their order; None is all. `keep` is as in models.attention.maps. A query
        sees the keys of its own segment up to itself, a query of padding those of padding;
        everything else is zero.
        """
        segment_ids, positions = jnp.asarray(segment_ids), jnp.asarray(positions)
        every = range(self.config.num_heads)
        graph, stacked = nnx.split(self.blocks)
        block = nnx.merge(graph, jax.tree.map(lambda x: x[layer], stacked))
        q, k = block.queries_and_keys(
            block.normed(states, block.attention_norm), self._turn(positions)
        )
        return maps(q, k, segment_ids, heads=every if heads is None else heads, keep=keep)

    def unembedding(self) -> Float[Array, "embed vocab"]:
        """The head as [D, V]: used as the transpose of [V, D] its product was 3.6× slower.

        With tied embeddings this is a transposed copy: take it once, outside loops.
        """
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

    def _turn(self, positions: Int[Array, "batch time"]) -> tuple[Array, Array]:
        return rotation(positions, head_dim=self.config.head_dim, theta=self.config.rope_theta)

    def _numbered(self, hidden_layers: Sequence[int]) -> list[int]:
        last = self.config.num_layers
        for layer in hidden_layers:
            if not -1 <= layer <= last:
                raise ValueError(
                    f"hidden layer {layer} does not exist: this model has layers 0 (embedding) "
                    f"to {last} (after the final norm, also −1)."
                )
        return sorted({last if layer == -1 else layer for layer in hidden_layers})

    def _through_blocks(
        self,
        x: Float[Array, "batch time embed"],
        segment_ids: Int[Array, "batch time"],
        turn: tuple[Array, Array],
        *,
        keep: Sequence[int],
    ) -> tuple[Array, list[Array]]:
        """Scan x through the blocks, keeping the outputs of the blocks numbered (from 1)."""
        graph, stacked = nnx.split(self.blocks)
        # One slot a kept layer and a last one that the others overwrite, so that the
        # outputs of all L blocks never exist together.
        spare = len(keep)
        slots = np.full(self.config.num_layers, spare)
        slots[[layer - 1 for layer in keep]] = np.arange(spare)
        kept = jnp.zeros((spare + 1, *x.shape), x.dtype) if keep else None

        def step(carry, per_layer):
            (x, kept), (weights, slot) = carry, per_layer
            x = nnx.merge(graph, weights)(x, segment_ids, turn)
            if kept is not None:
                kept = lax.dynamic_update_index_in_dim(kept, x, slot, 0)
            return (x, kept), None

        (x, kept), _ = lax.scan(step, (x, kept), (stacked, slots))
        return x, [] if kept is None else [kept[i] for i in range(spare)]


class Blocks(nnx.Module):
    """All blocks at once, parameters stacked; calling it needs one block's slice of them."""

    def __init__(self, config: ModelConfig, *, new: "_Initializer", dtype: DTypeLike):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        c, layers = config, config.num_layers
        into = {"layers": layers, "embed": c.hidden_size}
        kv = {"kv_heads": c.num_kv_heads, "head_dim": c.head_dim}
        # Each block adds twice to the residual stream; scaled so that the sum keeps its size.
        quiet = (2 * layers) ** -0.5
        self.attention_norm = new.ones(**into)
        self.query = new.normal(**into, heads=c.num_heads, head_dim=c.head_dim)
        self.key = new.normal(**into, **kv)
        self.value = new.normal(**into, **kv)
        if c.qkv_bias:
            self.query_bias = new.zeros(layers=layers, heads=c.num_heads, head_dim=c.head_dim)
            self.key_bias = new.zeros(layers=layers, **kv)
            self.value_bias = new.zeros(layers=layers, **kv)
        self.output = new.normal(
            layers=layers, heads=c.num_heads, head_dim=c.head_dim, embed=c.hidden_size, scale=quiet
        )
        self.mlp_norm = new.ones(**into)
        self.gate = new.normal(**into, mlp=c.intermediate_size)
        self.up = new.normal(**into, mlp=c.intermediate_size)
        self.down = new.normal(
            layers=layers, mlp=c.intermediate_size, embed=c.hidden_size, scale=quiet
        )

    def __call__(
        self,
        x: Float[Array, "batch time embed"],
        segment_ids: Int[Array, "batch time"],
        turn: tuple[Array, Array],
    ) -> Float[Array, "batch time embed"]:
        """One block, when this holds one block's parameters (no `layers` axis)."""
        x = x + self.attention(self.normed(x, self.attention_norm), segment_ids, turn)
        return x + self.mlp(self.normed(x, self.mlp_norm))

    def normed(self, x: Array, weight: nnx.Param) -> Array:
        """RMSNorm, cast for the matrix products that follow."""
        return rms_norm(x, weight[...], eps=self.config.norm_eps).astype(self.dtype)

    def attention(self, x: Array, segment_ids: Array, turn: tuple[Array, Array]) -> Array:
        """Grouped-query attention with rotary positions."""
        q, k = self.queries_and_keys(x, turn)
        v = contract("btd,dhk->bthk", x, self.value[...])
        if self.config.qkv_bias:
            v = v + self.value_bias[...]
        mixed = attend(q, k, v.astype(self.dtype), segment_ids)
        return contract("bthk,hkd->btd", mixed, self.output[...])

    def queries_and_keys(self, x: Array, turn: tuple[Array, Array]) -> tuple[Array, Array]:
        """Of normed states, [batch, time, heads or kv_heads, head_dim], turned by position."""
        q = contract("btd,dhk->bthk", x, self.query[...])
        k = contract("btd,dhk->bthk", x, self.key[...])
        if self.config.qkv_bias:
            q, k = q + self.query_bias[...], k + self.key_bias[...]
        return rotate(q, turn).astype(self.dtype), rotate(k, turn).astype(self.dtype)

    def mlp(self, x: Array) -> Array:
        """SwiGLU: down(silu(gate(x)) · up(x))."""
        gate = contract("btd,df->btf", x, self.gate[...])
        up = contract("btd,df->btf", x, self.up[...])
        return contract("btf,fd->btd", (nnx.silu(gate) * up).astype(self.dtype), self.down[...])


def parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Every parameter by its dotted path, `blocks.query`: the name that files map to theirs."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): parameter for path, parameter in flat}


def rms_norm(
    x: Float[Array, "*axes embed"], weight: Float[Array, " embed"], *, eps: float
) -> Float[Array, "*axes embed"]:
    """x / √(mean x² + eps) · weight, in float32."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rotation(
    positions: Int[Array, "batch time"], *, head_dim: int, theta: float
) -> tuple[Float[Array, "batch time 1 half"], Float[Array, "batch time 1 half"]]:
    """Cosine and sine of position · theta^(−2i/head_dim), for pairs i of coordinates."""
    # The frequencies that weights were trained with: a float32 power, then a float32
    # reciprocal. One unit in the last place is up to 6e-5 radians at position 1,000.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.float64(theta) ** exponents.astype(np.float64)
    frequencies = np.float32(1) / powers.astype(np.float32)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch time heads head_dim"], turn: tuple[Array, Array]
) -> Float[Array, "batch time heads head_dim"]:
    """Turn each pair of coordinates (i, i + head_dim/2) by its angle, in float32."""
    cos, sin = turn
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class _Initializer:
    """Makes parameters whose shape and logical axes are one statement: `normal(embed=576)`."""

    def __init__(self, rngs: nnx.Rngs, dtype: DTypeLike):
        self.rngs, self.dtype = rngs, jnp.dtype(dtype)

    def normal(self, *, scale: float = 1.0, **axes: int) -> nnx.Param:
        # The default generator takes over a second to compile for every new shape on a CPU.
        seed = jnp.tile(jax.random.key_data(self.rngs.params()), 2)
        key = jax.random.wrap_key_data(seed, impl="rbg")
        draw = jax.random.normal(key, tuple(axes.values()), jnp.float32)
        return nnx.Param((draw * (0.02 * scale)).astype(self.dtype), axes=tuple(axes))

    def ones(self, **axes: int) -> nnx.Param:
        return nnx.Param(jnp.ones(tuple(axes.values()), self.dtype), axes=tuple(axes))

    def zeros(self, **axes: int) -> nnx.Param:
        return nnx.Param(jnp.zeros(tuple(axes.values()), self.dtype), axes=tuple(axes))
