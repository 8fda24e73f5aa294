"""The decoder's blocks: attention of either kind, and an MLP or experts, added to the residual
stream."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, DTypeLike, Float, Int

from decant.models.config import ModelConfig
from decant.models.decoder import altup
from decant.models.decoder.activations import above_cutoff, activated
from decant.models.decoder.attention import attend, attend_past
from decant.models.decoder.experts import choose_experts, mixture_of_experts
from decant.models.decoder.initializer import Initializer
from decant.models.decoder.linear_attention import (
    LinearState,
    convolve,
    gated_delta_rule,
    gated_norm,
    unit_length,
)
from decant.models.decoder.norms import BIAS, add_norm, norm, norm_parameters
from decant.models.mesh.execution import PRODUCTS
from decant.models.numerics import contract
from decant.models.rotary import rotate

LORA_A, LORA_B = "_lora_a", "_lora_b"
"""Endings of an adapter's matrices beside the matrix that they change; see
`checkpoints/adapters.py`."""


class Rotation(NamedTuple):
    """How positions enter queries and keys, [batch, time, 1, …] each."""

    cos: Array
    sin: Array
    query_factor: Array | None
    """[batch, time, 1, 1], of queries only; None: 1."""


LATENT_EPS = 1e-6
"""eps of the norms of narrow vectors: DeepSeek's, whatever the eps of the other norms."""


Rotations = list[Rotation]
"""Each block uses one of them. Empty if no block rotates."""


Axes = dict[str, int]
"""Logical axes of a parameter, and their sizes."""


class BlockPattern(NamedTuple):
    """Settings that differ between blocks: [layers] arrays, or scalars inside a scan or by index.

    A field is None if no block of this model uses it; the compiled program omits it.
    """

    window: Array | None
    """int [*layers]: how many positions a query sees, itself included."""
    rotation: Array | None
    """int [*layers]: which of the rotations the block uses. None: the only one."""
    layer_input: Array | None = None
    """[*layers, batch, time, layer_input_dim], in float32."""
    cutoff: Array | None = None
    """float32 [*layers]: how many standard deviations above their mean gates of the MLP begin to
    count."""


KeysAndValues = tuple[Array, Array]
"""Of one block: [batch, slots, kv_heads, head_dim] each, rotary positions applied."""


class Past(NamedTuple):
    """The slots that new tokens see in one block, and where they stand among them."""

    kept: KeysAndValues | LinearState
    """Of the tokens so far. What keys' slots from `length` on hold does not matter."""
    segment_ids: Array
    """int [batch, slots]."""
    length: Array
    """int: the first new token's slot, in every row."""


class Blocks(nnx.Module):
    """All blocks, their parameters stacked along a leading `layers` axis.

    Its methods run one block: they need an object that holds one block's slice of each parameter.
    """

    def __init__(self, config: ModelConfig, *, new: Initializer, dtype: DTypeLike):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.lora_scaling = 1.0
        c, layers = config, config.num_layers
        into = {"layers": layers, "embed": c.hidden_size}
        heads = {"heads": c.num_heads, "head_dim": c.head_dim}
        kv = {"kv_heads": c.num_kv_heads, "head_dim": c.head_dim}
        mixed = {"heads": c.num_heads, "head_dim": c.value_width}
        experts = {"experts": c.num_experts} if c.num_experts else {}
        wide, narrow = {"mlp": c.intermediate_size}, {"embed": c.hidden_size}
        # Each block adds twice to the residual stream; this scale keeps the sum's size.
        residual_scale = (2 * layers) ** -0.5
        self.linear = c.linear_layers[0]  # of all blocks, which are alike
        self.reads = c.reading_layers > 0
        if self.linear:
            self._add_linear(new, into, scale=residual_scale)
        elif c.latent_dim:
            self._add_latents(new, into)
        else:
            self.query = new.normal(**into, **heads)
            if not self.reads:
                self.key = new.normal(**into, **kv)
            if not self.reads and not c.full_keys_are_values:
                self.value = new.normal(**into, **kv | {"head_dim": c.value_width})
        if not self.linear:
            self.output = new.normal(layers=layers, **mixed, **narrow, scale=residual_scale)
        if c.attention_gate and not self.linear:
            self.output_gate = new.normal(**into, **mixed)
        if c.num_experts:
            self.router = new.normal(**into, **experts)
        if c.router_correction:
            self.router_correction_bias = new.zeros(layers=layers, **experts)
        if c.shared_intermediate_size:
            shared = {"mlp": c.shared_intermediate_size}
            self.shared_gate = new.normal(**into, **shared)
            self.shared_up = new.normal(**into, **shared)
            self.shared_down = new.normal(layers=layers, **shared, **narrow, scale=residual_scale)
        if c.shared_expert_gate:
            self.shared_expert_gate = new.normal(**into)
        if c.gated_mlp:
            self.gate = new.normal(layers=layers, **experts, **narrow, **wide)
        self.up = new.normal(layers=layers, **experts, **narrow, **wide)
        self.down = new.normal(layers=layers, **experts, **wide, **narrow, scale=residual_scale)
        for matrix, axes in self._biases(heads=heads, kv=kv, wide=wide, experts=experts).items():
            setattr(self, matrix + BIAS, new.zeros(layers=layers, **axes))
        if c.attention_sinks and not self.linear:
            self.sink_bias = new.zeros(layers=layers, heads=c.num_heads)
        for name, axes in self._norms(heads=heads, kv=kv).items():
            add_norm(self, name, new=new, config=c, layers=layers, **axes)
        # Called biases because they have no weight decay either.
        if c.layer_factors:
            self.layer_factor_bias = new.ones(layers=layers, norm=1)
        if c.expert_norms:
            self.expert_factor_bias = new.ones(layers=layers, **experts)
        if c.layer_input_dim:
            self.input_gate = new.normal(**into, rank=c.layer_input_dim)
            rank = {"rank": c.layer_input_dim}
            self.input_output = new.normal(layers=layers, **rank, **narrow, scale=residual_scale)
        if c.laurel_rank:
            self.laurel_left = new.normal(**into, rank=c.laurel_rank)
            self.laurel_right = new.normal(layers=layers, rank=c.laurel_rank, **narrow)
        if c.stream_copies > 1:
            altup.add_coefficients(self, new=new)

    def _add_latents(self, new: Initializer, into: Axes) -> None:
        """The matrices of queries, keys and values that are made of narrow vectors."""
        c, layers = self.config, {"layers": self.config.num_layers}
        source = into
        if c.query_latent_dim:
            self.query_latent = new.normal(**into, rank=c.query_latent_dim)
            add_norm(
                self, "query_latent_norm", new=new, config=c, **layers, norm=c.query_latent_dim
            )
            source = layers | {"latent": c.query_latent_dim}
        self.query = new.normal(**source, heads=c.num_heads, head_dim=c.head_dim)
        self.latent = new.normal(**into, rank=c.latent_dim)
        self.turned_key = new.normal(**into, rank=c.turned)
        add_norm(self, "latent_norm", new=new, config=c, **layers, norm=c.latent_dim)
        source = layers | {"latent": c.latent_dim}
        self.key = new.normal(**source, kv_heads=c.num_heads, head_dim=c.head_dim - c.turned)
        self.value = new.normal(**source, kv_heads=c.num_heads, head_dim=c.value_width)

    def _add_linear(self, new: Initializer, into: Axes, *, scale: float) -> None:
        """The parameters of linear attention."""
        c, layers = self.config, {"layers": self.config.num_layers}
        taps = layers | {"taps": c.convolution}
        groups = {"kv_heads": c.linear_key_heads}
        heads = groups | {"shared_heads": c.linear_value_heads // c.linear_key_heads}
        keys = groups | {"head_dim": c.linear_key_dim}
        values = heads | {"head_dim": c.linear_value_dim}
        for name, axes in (("query", keys), ("key", keys), ("value", values)):
            setattr(self, f"linear_{name}", new.normal(**into, **axes))
            # Convolutions begin with sums of normed states, of any size: 0.5 is a usual one.
            setattr(self, f"{name}_taps", new.normal(**taps, **axes, scale=25.0))
        self.linear_gate = new.normal(**into, **values)
        self.linear_rate = new.normal(**into, **heads)
        self.linear_decay = new.normal(**into, **heads)
        self.linear_decay_bias = new.ones(**layers, **heads)
        # From heads that hardly forget to heads that see little but the last position.
        decays = jnp.log(jnp.linspace(0.01, 16.0, c.linear_value_heads))
        self.log_decay_bias = new.filled(decays, **layers, **heads)
        self.linear_norm = new.ones(**layers, head_dim=c.linear_value_dim)
        self.linear_output = new.normal(**layers, **values, embed=c.hidden_size, scale=scale)

    def _biases(self, *, heads: Axes, kv: Axes, wide: Axes, experts: Axes) -> dict[str, Axes]:
        """Matrices that have a bias, and the bias's axes."""
        c, norm_axis = self.config, {"norm": self.config.hidden_size}
        attention = not self.linear
        biases = {"query": heads, "key": kv, "value": kv} if c.qkv_bias and attention else {}
        if c.output_bias and attention:
            biases |= {"output": norm_axis}
        if c.mlp_bias:
            into = experts | wide
            biases |= {"gate": into} if c.gated_mlp else {}
            biases |= {"up": into, "down": experts | norm_axis}
        if c.router_bias:
            biases |= {"router": experts}
        return biases

    def _norms(self, *, heads: Axes, kv: Axes) -> dict[str, Axes]:
        """Norms of a block, and the axes that they go over."""
        c, whole = self.config, {"norm": self.config.hidden_size}
        norms = {"attention_norm": whole, "mlp_norm": whole} if c.pre_norms else {}
        if c.post_norms:
            norms |= {"attention_post_norm": whole, "mlp_post_norm": whole}
        if c.qk_norm and not self.linear:
            one = {"head_dim": c.head_dim}
            over = (heads, kv) if c.qk_norm_whole else (one, one)
            norms |= zip(("query_norm", "key_norm"), over, strict=True)
        if self.reads:
            norms.pop("key_norm", None)
        if c.layer_input_dim:
            norms |= {"input_post_norm": whole}
        if c.laurel_rank:
            norms |= {"laurel_norm": whole}
        if c.stream_copies > 1:
            norms |= {"copy_router_norm": whole}
        if c.expert_norms:
            more = ("router_norm", "expert_norm", "expert_post_norm", "shared_post_norm")
            norms |= dict.fromkeys(more, whole)
        return norms

    def __call__(
        self,
        x: Float[Array, "batch time *copies embed"],
        segment_ids: Int[Array, "batch time"],
        rotations: Rotations,
        pattern: BlockPattern,
        past: Past | None = None,
        read: KeysAndValues | None = None,
    ) -> tuple[
        Float[Array, "batch time *copies embed"],
        KeysAndValues | LinearState | None,
        KeysAndValues | None,
    ]:
        """The residual stream after one block, float32; the tokens' keys and values; and all the
        keys and values that the block saw.

        In the second's place, linear attention gives its state after the tokens, and a block that
        reads another's keys and values (`read`) gives None. `pattern` holds that block's settings.
        With `past` the tokens go on from it.
        """
        predicted = None
        if self.config.stream_copies > 1:
            predicted = altup.predict(self, x)
            x = predicted[:, :, 0]
        normed = self.before(x, "attention_norm")
        seen = None
        if self.linear:
            attended, made = self.linear_attention(normed, segment_ids, past)
        else:
            attended, made, seen = self.attention(
                normed, segment_ids, rotations, pattern, past, read
            )
        mixed = x + self.after(attended, "attention_post_norm")
        if self.config.laurel_rank:
            mixed = (mixed + self.laurel(normed)) * 2**-0.5
        source = x if self.config.parallel_blocks else mixed
        passed = self.mlp(self.before(source, "mlp_norm"), source, cutoff=pattern.cutoff)
        x = mixed + self.after(passed, "mlp_post_norm")
        if predicted is not None:
            x = altup.correct(self, predicted, x, pattern.layer_input)
        elif pattern.layer_input is not None:
            x = x + self.from_layer_input(x, pattern.layer_input)
        if self.config.layer_factors:
            x = x * self.layer_factor_bias[...].astype(jnp.float32)
        return x, made, seen

    def laurel(self, normed: Array) -> Array:
        """The residual branch beside attention: its input, and a map of low rank of it, normed."""
        low = self.project("btd,dr->btr", normed, "laurel_left").astype(self.dtype)
        out = self.project("btr,rd->btd", low, "laurel_right")
        return normed + norm(out, norm_parameters(self, "laurel_norm"), config=self.config)

    def from_layer_input(self, x: Array, layer_input: Array) -> Array:
        """What the block's own input of each token adds to the residual stream."""
        gate = self.project("btd,dr->btr", x.astype(self.dtype), "input_gate")
        gated = activated(gate, layer_input, activation=self.config.activation, dtype=self.dtype)
        out = self.project("btr,rd->btd", gated, "input_output")
        return norm(out, norm_parameters(self, "input_post_norm"), config=self.config)

    def project(self, equation: str, x: Array, name: str) -> Array:
        """The einsum of activations with the parameter called `name`, plus its bias; float32."""
        product = contract(equation, x, getattr(self, name)[...])
        # int8 weights have scales, see checkpoints/quantization.py.
        scales = getattr(self, f"{name}_scale", None)
        if scales is not None:
            product = product * _along_channels(equation, scales[...])
        if hasattr(self, name + LORA_A):
            product = product + self._low_rank(equation, x, name)
        bias = getattr(self, name + BIAS, None)
        return product if bias is None else product + _along_channels(equation, bias[...])

    def _low_rank(self, equation: str, x: Array, name: str) -> Array:
        """What the adapter of the parameter called `name` adds to the einsum; R is its rank."""
        operands, out = equation.split("->")
        left, matrix = operands.split(",")
        inputs = "".join(axis for axis in matrix if axis not in out)
        low = "".join(axis for axis in left if axis not in inputs) + "R"
        a, b = getattr(self, name + LORA_A)[...], getattr(self, name + LORA_B)[...]
        narrow = contract(f"{left},{inputs}R->{low}", x, a).astype(x.dtype)
        outputs = matrix.translate({ord(axis): None for axis in inputs})
        return self.lora_scaling * contract(f"{low},R{outputs}->{out}", narrow, b)

    def before(self, x: Array, name: str) -> Array:
        """What attention or MLP reads: x, after the norm `name`, in the dtype of its products."""
        if not self.config.pre_norms:
            return x.astype(self.dtype)

        def cast(x: Array, parameters: tuple[Array, Array | None]) -> Array:
            return norm(x, parameters, config=self.config).astype(self.dtype)

        # Training keeps only x, which the residual stream keeps anyway.
        return jax.checkpoint(cast, prevent_cse=False)(x, norm_parameters(self, name))

    def after(self, x: Array, name: str) -> Array:
        """What the output x of attention or MLP adds to the residual stream."""
        if self.config.post_norms:
            x = norm(x, norm_parameters(self, name), config=self.config)
        factor = self.config.residual_multiplier
        return x if factor == 1 else x * factor

    def attention(
        self,
        x: Array,
        segment_ids: Array,
        rotations: Rotations,
        pattern: BlockPattern,
        past: Past | None = None,
        read: KeysAndValues | None = None,
    ) -> tuple[Array, KeysAndValues | None, KeysAndValues]:
        """Grouped-query attention with rotary positions, of normed states, float32; the keys and
        values of these tokens, None if the block has `read` others; and all that it saw."""
        q, made = self.queries(x, rotations, pattern), None
        if read is None:
            read = made = self.keys(x, rotations, pattern), self.values(x)
            if past is not None:
                new_k, new_v = (
                    lax.dynamic_update_slice_in_dim(kept, new, past.length, axis=1)
                    for kept, new in zip(past.kept, made, strict=True)
                )
                read = new_k, new_v
        k, v = read
        shape = {
            "scale": self.config.score_scale,
            "softcap": self.config.attention_softcap,
            "sinks": self.sink_scores(),
        }
        if past is None:
            mixed = attend(
                checkpoint_name(q, PRODUCTS),
                checkpoint_name(k, PRODUCTS),
                checkpoint_name(v, PRODUCTS),
                segment_ids,
                pattern.window,
                **shape,
            )
        else:
            mixed = attend_past(
                q,
                k,
                v,
                segment_ids,
                past.segment_ids,
                pattern.window,
                offset=past.length,
                **shape,
            )
        if self.config.attention_gate:
            gate = nnx.sigmoid(self.project("btd,dhk->bthk", x, "output_gate"))
            mixed = (mixed * gate).astype(self.dtype)
        return self.project("bthk,hkd->btd", mixed, "output"), made, read

    def linear_attention(
        self, x: Array, segment_ids: Array, past: Past | None = None
    ) -> tuple[Array, LinearState]:
        """The gated delta rule of normed states, float32; and the state after these tokens."""
        kept = past.kept if past else None
        assert kept is None or isinstance(kept, LinearState)
        into_heads = {"query": "dgk->btgk", "key": "dgk->btgk", "value": "dgrk->btgrk"}
        inputs = [
            checkpoint_name(self.project(f"btd,{axes}", x, f"linear_{name}"), PRODUCTS)
            for name, axes in into_heads.items()
        ]
        (q, queries), (k, keys), (v, values) = (
            convolve(each, getattr(self, f"{name}_taps")[...], segment_ids, before)
            for name, each, before in zip(
                into_heads, inputs, kept[:3] if kept else (None,) * 3, strict=True
            )
        )
        steps = jax.nn.softplus(self.project("btd,dgr->btgr", x, "linear_decay"))
        out, matrix = gated_delta_rule(
            unit_length(q) * self.config.linear_key_dim**-0.5,
            unit_length(k),
            v,
            -jnp.exp(self.log_decay_bias[...].astype(jnp.float32)) * steps,
            nnx.sigmoid(self.project("btd,dgr->btgr", x, "linear_rate")),
            segment_ids,
            kept.matrix if kept else None,
        )
        gate = self.project("btd,dgrk->btgrk", x, "linear_gate")
        out = gated_norm(out, gate, self.linear_norm[...], eps=self.config.norm_eps)
        out = self.project("btgrk,grkd->btd", out.astype(self.dtype), "linear_output")
        return out, LinearState(queries, keys, values, matrix)

    def sink_scores(self) -> Array | None:
        """The score of each head that belongs to no key; None if heads have none."""
        return self.sink_bias[...] if self.config.attention_sinks else None

    def queries(self, x: Array, rotations: Rotations, pattern: BlockPattern) -> Array:
        """Queries of normed states, rotated by position: [batch, time, heads, head_dim]."""
        q = self.project("btd,dhk->bthk", self.narrow(x, "query_latent"), "query")
        if self.config.qk_norm:
            q = norm(q, norm_parameters(self, "query_norm"), config=self.config)
        if rotations:
            rotation = _chosen(rotations, pattern.rotation)
            q = self._turn(q, (rotation.cos, rotation.sin))
            if rotation.query_factor is not None:
                q = q * rotation.query_factor
        return q.astype(self.dtype)

    def keys(self, x: Array, rotations: Rotations, pattern: BlockPattern) -> Array:
        """Keys of normed states, rotated by position: [batch, time, kv_heads, head_dim]."""
        k = self.project("btd,dhk->bthk", self.narrow(x, "latent"), "key")
        if self.config.latent_dim:
            shared = self.project("btd,dr->btr", x, "turned_key")[:, :, None]
            turned = jnp.broadcast_to(shared, (*k.shape[:-1], shared.shape[-1]))
            k = jnp.concatenate([k, turned], axis=-1)
        if self.config.qk_norm:
            k = norm(k, norm_parameters(self, "key_norm"), config=self.config)
        if rotations:
            rotation = _chosen(rotations, pattern.rotation)
            k = self._turn(k, (rotation.cos, rotation.sin))
        return k.astype(self.dtype)

    def values(self, x: Array) -> Array:
        """Values of normed states: [batch, time, kv_heads, value width]."""
        name = "key" if self.config.full_keys_are_values else "value"
        v = self.project("btd,dhk->bthk", self.narrow(x, "latent"), name)
        if self.config.value_norm:
            mean = jnp.mean(v * v, axis=-1, keepdims=True)
            v = v * lax.rsqrt(mean + self.config.norm_eps)
        return v.astype(self.dtype)

    def narrow(self, x: Array, name: str) -> Array:
        """What a matrix reads: x, or the normed vector that the parameter `name` makes of it."""
        if not hasattr(self, name):
            return x
        latent = self.project("btd,dr->btr", x, name)
        parameters = norm_parameters(self, f"{name}_norm")
        return norm(latent, parameters, config=self.config, eps=LATENT_EPS).astype(self.dtype)

    def _turn(self, x: Array, rotation: tuple[Array, Array]) -> Array:
        """Queries or keys with the part of each head turned that the config says."""
        c = self.config
        still = c.head_dim - c.turned if c.latent_dim else 0
        turned = rotate(x[..., still:], rotation, neighbours=c.rotary_neighbours)
        return jnp.concatenate([x[..., :still], turned], axis=-1) if still else turned

    def mlp(self, x: Array, source: Array, *, cutoff: Array | None = None) -> Array:
        """The MLP, or a mixture of those that each token's router chooses; float32.

        `x` are the states of `source` after the MLP's norm. `cutoff` as in `BlockPattern`.
        """
        c = self.config
        if not c.num_experts:
            return self.one_mlp(x, into="btd,df->btf", out="btf,fd->btd", cutoff=cutoff)
        plain = x
        if c.expert_norms:
            x = self.before(source, "expert_norm")
            routed = self.before(source, "router_norm").astype(jnp.float32) * c.hidden_size**-0.5
        else:
            routed = x
        ids, weights = choose_experts(
            self.project("btd,de->bte", routed.astype(self.dtype), "router"),
            self.router_correction_bias[...] if c.router_correction else None,
            count=c.experts_per_token,
            normalise=c.normalise_experts,
            router=c.router,
            groups=c.expert_groups,
            groups_per_token=c.groups_per_token,
            group_votes=c.group_votes,
            multiplier=c.expert_multiplier,
        )
        if c.expert_norms:
            weights = weights * self.expert_factor_bias[...].astype(jnp.float32)[ids]

        def every_expert(slots: Array) -> Array:
            out = self.one_mlp(slots, into="ebsd,edf->ebsf", out="ebsf,efd->ebsd")
            return out.astype(self.dtype)

        mixed = mixture_of_experts(x, ids, weights, num_experts=c.num_experts, expert=every_expert)
        if not c.shared_intermediate_size:
            return mixed
        shared = self.one_mlp(plain, into="btd,df->btf", out="btf,fd->btd", of="shared_")
        if c.expert_norms:
            shared = norm(shared, norm_parameters(self, "shared_post_norm"), config=c)
            mixed = norm(mixed, norm_parameters(self, "expert_post_norm"), config=c)
        if c.shared_expert_gate:
            shared = (
                shared * nnx.sigmoid(self.project("btd,d->bt", x, "shared_expert_gate"))[..., None]
            )
        return mixed + shared

    def one_mlp(
        self, x: Array, *, into: str, out: str, of: str = "", cutoff: Array | None = None
    ) -> Array:
        """down(activation(gate(x)) · up(x)), or down(activation(up(x))); float32.

        `into` is the einsum equation of gate and up, `out` that of down; `of` begins their names.
        """
        names = ("gate", "up") if self.config.gated_mlp else ("up",)
        inputs = [self.project(into, x, of + name) for name in names]
        if cutoff is not None:
            inputs[0] = above_cutoff(inputs[0], cutoff)
        wide = activated(*inputs, activation=self.config.activation, dtype=self.dtype)
        return self.project(out, wide, of + "down")


def _along_channels(equation: str, values: Array) -> Array:
    """Values of the output channels of an einsum's matrix, which broadcast to its result."""
    matrix, out = equation.split(",")[1].split("->")
    sizes = iter(values.shape)
    return values.reshape([next(sizes) if axis in matrix else 1 for axis in out])


def _chosen(rotations: Rotations, number: Array | None) -> Rotation:
    """The rotation of that number."""
    chosen = rotations[0]
    for i, other in enumerate(rotations[1:], 1):
        chosen = jax.tree.map(lambda a, b, i=i: jnp.where(number == i, b, a), chosen, other)
    return chosen
