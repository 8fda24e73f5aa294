"""The shape of a decoder: every setting that decides which function the weights compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from decant.models.rotary import (
    DynamicScaling,
    LongRopeScaling,
    Scaling,
    YarnScaling,
    usual_attention_factor,
)

# The fields that a config had when the first caches were captured. Their teacher_id is made from
# these fields, so a field added later enters an identity only if it differs from its default.
_ALWAYS_IN_IDENTITY = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"),
    *("num_kv_heads", "head_dim", "rope_theta", "norm_eps", "max_positions"),
    *("tie_embeddings", "qkv_bias", "family"),
)

Item = TypeVar("Item")

_POSITIONS = 2**31 - 1  # numbers of positions are int32
MOST = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "intermediate_size": 2**21,
    "num_layers": 2**12,
    "num_heads": 2**12,
    "num_kv_heads": 2**12,
    "head_dim": 2**12,
    "value_dim": 2**12,
    "latent_dim": 2**16,
    "query_latent_dim": 2**16,
    "linear_key_heads": 2**12,
    "linear_value_heads": 2**12,
    "linear_key_dim": 2**12,
    "linear_value_dim": 2**12,
    "convolution": 2**8,
    "full_head_dim": 2**12,
    "full_kv_heads": 2**12,
    "reading_layers": 2**12,
    "layer_input_dim": 2**12,
    "layer_input_rows": 2**24,
    "stream_copies": 2**6,
    "laurel_rank": 2**16,
    "max_positions": _POSITIONS,
    "windows": _POSITIONS,
    "num_experts": 2**12,
    "experts_per_token": 2**12,
}
"""The largest value of each size: about ten times that of any published model. Work that depends
on a size alone, before any weights are read, then ends soon."""
_MOST_EXPERTS = 2**18
"""Experts of all layers: each is three tensors of a checkpoint."""
_LINEAR = (
    *("linear_key_heads", "linear_value_heads", "linear_key_dim", "linear_value_dim"),
    "convolution",
)
_OPTIONAL = (
    *("value_dim", "latent_dim", "query_latent_dim", *_LINEAR),
    *("full_head_dim", "full_kv_heads", "reading_layers", "layer_input_dim"),
    *("layer_input_rows", "laurel_rank"),
)
"""Sizes that may be 0."""
_SIZES = tuple(name for name in MOST if name not in ("windows", "num_experts", "experts_per_token"))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder of any supported family.

    Equal configs and equal weights give equal outputs. How arrays are stored, sharded or computed
    is not part of a config. ValueError for values that do not fit together.
    """

    vocab_size: int
    """Rows of the embedding. May exceed the tokenizer's size, because checkpoints pad it."""
    hidden_size: int
    intermediate_size: int
    """Width of the MLP, or of each expert's MLP."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Heads of keys and values; num_heads / num_kv_heads query heads share each of them."""
    head_dim: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    max_positions: int = 2048
    """Length of the longest sequence that the weights were trained for."""
    tie_embeddings: bool = False
    """The unembedding is the transposed embedding; no second matrix exists."""
    qkv_bias: bool = False
    """Queries, keys and values have biases."""
    family: str = "llama"
    """Name of the module in `models/families` that reads and writes this model's files."""
    rope_scaling: Scaling | None = None
    """How the rotary frequencies of blocks without a rotary base of their own are scaled."""
    rotary_dim: int | None = None
    """How many of a head's coordinates are turned: the first, or with latent_dim the last. None:
    all."""
    query_growth: tuple[float, int] | None = None
    """(β, n): queries at position p are multiplied by 1 + β·ln(1 + ⌊p/n⌋). None: by 1."""
    windows: tuple[int | None, ...] = (None,)
    """How many positions a query sees, itself included; None: itself and all before it. Block i
    takes entry i modulo the length, so Gemma 2's (4096, None) alternates."""
    window_rope_theta: float | None = None
    """Rotary base of the blocks that have a window; it is never scaled. None: they use rope_theta
    and rope_scaling like the other blocks."""
    qk_norm: bool = False
    """Each head's queries and keys are normalised before rotary positions are applied."""
    post_norms: bool = False
    """The outputs of attention and MLP are normalised before they are added to the residual
    stream."""
    norm_adds_one: bool = False
    """Norms multiply by 1 + weight."""
    scale_embedding: bool = False
    """The embedding's output is multiplied by √hidden_size."""
    activation: Literal["silu", "gelu_tanh", "gelu", "clamped_swish"] = "silu"
    """Activation of the MLP: x·sigmoid(x), GELU's approximation by tanh, or GELU itself; or the
    one of gpt-oss, which also changes what it is multiplied by (`decoder/activations.py`)."""
    query_scalar: float | None = None
    """Attention scores are divided by its square root. None: by that of head_dim."""
    attention_softcap: float | None = None
    """c: attention scores s become c·tanh(s/c). None: they are not capped."""
    final_softcap: float | None = None
    """The same for logits, which `numerics.logits` computes."""
    num_experts: int = 0
    """MLPs among which each token chooses. 0: one MLP for all tokens."""
    experts_per_token: int = 0
    """How many experts each token chooses."""
    normalise_experts: bool = False
    """The chosen experts' weights are divided by their sum."""
    rotary_layers: tuple[bool, ...] = (True,)
    """Whether a block rotates queries and keys by their position. Block i takes entry i modulo the
    length."""
    learned_positions: bool = False
    """A vector for each of the max_positions positions is added to the embedding's output."""
    norm: Literal["rms", "layer"] = "rms"
    """Kind of all norms: RMSNorm, or LayerNorm with a bias."""
    pre_norms: bool = True
    """The inputs of attention and MLP are normalised."""
    qk_norm_whole: bool = False
    """The norm of queries, and that of keys, goes over all heads together."""
    parallel_blocks: bool = False
    """Attention and MLP of a block read the same input, the block's."""
    gated_mlp: bool = True
    """The MLP is down(activation(gate) · up), rather than down(activation(up))."""
    output_bias: bool = False
    """The output projection of attention has a bias."""
    mlp_bias: bool = False
    """The matrices of the MLP, or of each expert, have biases."""
    router_bias: bool = False
    """The router of experts has a bias."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """What makes an expert's weight of its score: a softmax over experts, or a sigmoid."""
    router_correction: bool = False
    """Experts are chosen by their weight plus a correction of their own, which the weight that they
    get does not have."""
    expert_groups: int = 1
    """Groups of experts; a token chooses groups_per_token of them, by the sum of a group's
    group_votes largest weights, and its experts among theirs."""
    groups_per_token: int = 1
    group_votes: int = 2
    expert_multiplier: float = 1.0
    """The chosen experts' weights are multiplied by it, after normalise_experts."""
    shared_intermediate_size: int = 0
    """Width of an MLP that every token passes, besides its experts; 0: there is none."""
    dense_layers: int = 0
    """The first blocks, which have one MLP of width dense_intermediate_size and no experts."""
    dense_intermediate_size: int = 0
    attention_sinks: bool = False
    """Each head has a score that takes part in the softmax and belongs to no key."""
    embedding_multiplier: float = 1.0
    """The embedding's output is multiplied by it."""
    residual_multiplier: float = 1.0
    """The outputs of attention and MLP are multiplied by it before they are added to the residual
    stream."""
    score_multiplier: float | None = None
    """Factor of attention scores. None: the one that query_scalar gives."""
    logit_divisor: float = 1.0
    """Logits are divided by it: the decoder divides the states that the head reads."""
    rotary_neighbours: bool = False
    """Coordinates 2i and 2i + 1 are a pair that is turned, rather than i and i + half."""
    value_dim: int = 0
    """Width of a head's values. 0: head_dim."""
    latent_dim: int = 0
    """Width of a normalised vector that is made of a position's state, and of which the keys and
    values of all heads are made. All heads' keys share the turned coordinates, which are made of
    the state itself. 0: keys and values are made of the state."""
    query_latent_dim: int = 0
    """The same for queries, whose turned coordinates are made of the vector, too."""
    yarn_score_scale: float = 0.0
    """m: with YaRN of factor f, attention scores are multiplied by (1 + 0.1 · m · ln f)²."""
    full_head_dim: int = 0
    """Size of a head in blocks without a window. 0: head_dim."""
    full_kv_heads: int = 0
    """Heads of keys and values in blocks without a window. 0: num_kv_heads."""
    full_keys_are_values: bool = False
    """Blocks without a window have no matrix of values: these are the keys before their norm."""
    value_norm: bool = False
    """Each head's values are divided by their root mean square."""
    reading_layers: int = 0
    """The last blocks, which make no keys and values. They read those of the last block before all
    of them that has a window as they have, or none as they have."""
    reading_mlp_factor: int = 1
    """The MLP of these blocks is this many times as wide."""
    layer_input_dim: int = 0
    """Width of a vector that each block gets for each token besides the residual stream. It is made
    of the token's id and of its embedding. 0: there is none."""
    layer_input_rows: int = 0
    """Token ids of which that vector is made; larger ids take the first one's part. 0: all."""
    stream_copies: int = 1
    """Copies of the residual stream, of which blocks work on the first (`decoder/altup.py`). Hidden
    states are the first copy's. Blocks add their layer inputs to the others."""
    laurel_rank: int = 0
    """Rank of a map of attention's normed input, which is added beside attention's output. The sum
    is divided by √2. 0: there is none."""
    gate_sparsity: tuple[float, ...] = (0.0,)
    """Which share of the MLP's gates would be 0 if they were normally distributed: smaller gates
    are, and others are reduced by the same amount. 0: gates stay as they are. Block i takes entry i
    modulo the length."""
    layer_factors: bool = False
    """Each block's output is multiplied by a number of the block."""
    expert_norms: bool = False
    """The experts, and the MLP that every token passes besides them, have norms of their own inputs
    and outputs. The router reads the block's normed states, and each expert has a factor."""
    attention_gate: bool = False
    """The outputs of attention's heads are multiplied by the sigmoid of gates, one for each of
    their coordinates, which are made of the block's input."""
    shared_expert_gate: bool = False
    """The output of the MLP that every token passes besides its experts is multiplied by the
    sigmoid of one number, which is made of the MLP's input."""
    linear_layers: tuple[bool, ...] = (False,)
    """Which blocks have linear attention (`decoder/linear_attention.py`) in place of attention.
    Block i takes entry i modulo the length. The next five fields are 0 if there are none."""
    linear_key_heads: int = 0
    """Heads of queries and keys of linear attention."""
    linear_value_heads: int = 0
    """Heads of values; linear_value_heads / linear_key_heads of them share a query and a key."""
    linear_key_dim: int = 0
    linear_value_dim: int = 0
    convolution: int = 0
    """Positions, the own one included, over which queries, keys and values of linear attention are
    weighted sums."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            least = 0 if name in _OPTIONAL else 1
            if type(value) is not int or not least <= value <= MOST[name]:
                raise ValueError(
                    f"ModelConfig.{name} is {value}; expected a whole number from {least} to "
                    f"{MOST[name]:,}."
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig: {self.num_heads} query heads cannot share {self.num_kv_heads} "
                "key/value heads evenly; num_heads must be a multiple of num_kv_heads."
            )
        self._check_rotary()
        self._check_latents()
        self._check_linear()
        self._check_reading()
        if not self.windows or any(w is not None and w < 1 for w in self.windows):
            raise ValueError(
                f"ModelConfig.windows is {self.windows}; expected at least one entry, each a "
                "number of positions ≥ 1 or None."
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"ModelConfig.experts_per_token is {self.experts_per_token}; expected 1 to "
                f"num_experts = {self.num_experts}."
            )
        if self.num_experts * self.num_layers > _MOST_EXPERTS:
            raise ValueError(
                f"ModelConfig: num_experts {self.num_experts} in each of num_layers "
                f"{self.num_layers} are more than {_MOST_EXPERTS:,} experts."
            )
        if not self.rotary_layers:
            raise ValueError("ModelConfig.rotary_layers is empty; expected at least one entry.")
        if self.num_experts and not self.gated_mlp:
            raise ValueError("ModelConfig: experts are gated MLPs.")
        self._check_groups()
        self._check_sparsity()
        if self.dense_layers and not (self.num_experts and self.dense_layers < self.num_layers):
            raise ValueError(
                f"ModelConfig.dense_layers is {self.dense_layers} of {self.num_layers} blocks; at "
                "least one block must have experts."
            )
        if not self.dense_layers:
            object.__setattr__(self, "dense_intermediate_size", 0)
        # Normalised, so that equal functions have equal configs.
        object.__setattr__(self, "windows", shortest_cycle(self.layer_windows))
        if self.rotary_dim == self.head_dim:
            object.__setattr__(self, "rotary_dim", None)
        if self.value_dim == self.head_dim:
            object.__setattr__(self, "value_dim", 0)
        object.__setattr__(self, "rotary_layers", shortest_cycle(self.layers_rotate))
        object.__setattr__(self, "linear_layers", shortest_cycle(self.layers_linear))

    def _check_groups(self) -> None:
        groups, chosen = self.expert_groups, self.groups_per_token
        if groups == chosen == 1:
            return
        size, rest = divmod(self.num_experts, groups)
        votes, count = self.group_votes, self.experts_per_token
        if rest or not 1 <= votes <= size or not 1 <= chosen <= groups or count > chosen * size:
            raise ValueError(
                f"ModelConfig: {self.num_experts} experts in {groups} groups, of which a token "
                f"chooses {chosen} and among theirs {count} experts; expected equal groups of at "
                f"least {votes}, with enough experts."
            )

    def _check_sparsity(self) -> None:
        shares = self.gate_sparsity
        if not shares or not all(0 <= share < 1 for share in shares):
            raise ValueError(
                f"ModelConfig.gate_sparsity is {shares}; expected at least one entry, each a share "
                "from 0 to below 1."
            )
        if any(shares) and (self.num_experts or not self.gated_mlp):
            raise ValueError("ModelConfig.gate_sparsity needs a gated MLP, and no experts.")
        object.__setattr__(self, "gate_sparsity", shortest_cycle(self.layers_sparsity))

    def _check_latents(self) -> None:
        if self.query_latent_dim and not self.latent_dim:
            raise ValueError("ModelConfig.query_latent_dim needs latent_dim.")
        if not self.latent_dim:
            return
        if self.turned == self.head_dim or self.num_kv_heads != self.num_heads or self.qk_norm:
            raise ValueError(
                f"ModelConfig.latent_dim is {self.latent_dim}; expected as many key as query "
                "heads, of which only a part is turned, without norms of their own."
            )

    def _check_reading(self) -> None:
        if self.full_head_dim == self.head_dim:
            object.__setattr__(self, "full_head_dim", 0)
        if self.full_kv_heads == self.num_kv_heads:
            object.__setattr__(self, "full_kv_heads", 0)
        if self.layer_input_rows == self.vocab_size or not self.layer_input_dim:
            object.__setattr__(self, "layer_input_rows", 0)
        if not self.reading_layers:
            object.__setattr__(self, "reading_mlp_factor", 1)
        if self.full_head_dim and (self.window_rope_theta is None or self.rotary_dim is not None):
            raise ValueError(
                "ModelConfig.full_head_dim needs window_rope_theta, and heads that turn as a whole."
            )
        if self.num_heads % (self.full_kv_heads or self.num_kv_heads):
            raise ValueError(
                f"ModelConfig: {self.num_heads} query heads cannot share {self.full_kv_heads} "
                "key/value heads evenly."
            )
        if self.several_attentions and (self.dense_layers or any(self.layers_linear)):
            raise ValueError(
                "ModelConfig: blocks whose attention differs by window need experts in all blocks "
                "or in none, and no linear attention."
            )
        # Raises if a block has no source. A stack's config has blocks of one kind only, and none.
        if 0 < self.reading_layers < self.num_layers:
            _ = self.key_sources

    def _check_linear(self) -> None:
        if not self.linear_layers:
            raise ValueError("ModelConfig.linear_layers is empty; expected at least one entry.")
        if not any(self.layers_linear):
            for name in _LINEAR:
                object.__setattr__(self, name, 0)
            return
        keys, values = self.linear_key_heads, self.linear_value_heads
        if not all(getattr(self, name) for name in _LINEAR) or values % keys:
            raise ValueError(
                "ModelConfig: blocks of linear attention need sizes, of which linear_value_heads "
                "is a multiple of linear_key_heads; got "
                + ", ".join(f"{name} {getattr(self, name)}" for name in _LINEAR)
            )
        if self.dense_layers:
            raise ValueError(
                f"ModelConfig.dense_layers is {self.dense_layers}; a model that has blocks of "
                "linear attention has experts in all blocks or in none."
            )

    def _check_rotary(self) -> None:
        turned, scaling = self.turned, self.rope_scaling
        if self.head_dim % 2 or turned % 2 or not 2 <= turned <= self.head_dim:
            raise ValueError(
                f"ModelConfig.head_dim is {self.head_dim}, of which {turned} are turned; rotary "
                "positions turn pairs of coordinates, so both must be even."
            )
        if isinstance(scaling, LongRopeScaling):
            counts = {len(scaling.short_factors), len(scaling.long_factors)}
            if counts != {turned // 2}:
                raise ValueError(
                    f"ModelConfig.rope_scaling has {sorted(counts)} LongRoPE factors; expected "
                    f"{turned // 2} short and long ones each, one for each pair of coordinates."
                )
        if isinstance(scaling, YarnScaling) and self.rope_theta <= 1:
            raise ValueError(
                f"ModelConfig.rope_theta is {self.rope_theta}; YaRN expects a base above 1."
            )

    @property
    def longest_row(self) -> int:
        """The most tokens that a row may have: max_positions, or what the scaling is for."""
        scaling = self.rope_scaling
        if isinstance(scaling, (DynamicScaling, YarnScaling)):
            return max(self.max_positions, int(scaling.factor * scaling.original_max_positions))
        return self.max_positions

    @property
    def turned(self) -> int:
        """How many of a head's coordinates are turned by rotary positions."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def value_width(self) -> int:
        """How many coordinates a head's values have."""
        return self.value_dim or self.head_dim

    @property
    def score_scale(self) -> float:
        """The factor of attention scores."""
        if self.score_multiplier is not None:
            return self.score_multiplier
        scale = (self.head_dim if self.query_scalar is None else self.query_scalar) ** -0.5
        if not isinstance(self.rope_scaling, YarnScaling) or not self.yarn_score_scale:
            return scale
        return scale * usual_attention_factor(self.rope_scaling.factor, self.yarn_score_scale) ** 2

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of every block, num_layers entries."""
        return tuple(self.windows[i % len(self.windows)] for i in range(self.num_layers))

    @property
    def layers_rotate(self) -> tuple[bool, ...]:
        """Whether each block rotates queries and keys, num_layers entries."""
        return tuple(
            self.rotary_layers[i % len(self.rotary_layers)] for i in range(self.num_layers)
        )

    @property
    def layers_linear(self) -> tuple[bool, ...]:
        """Whether each block has linear attention, num_layers entries."""
        return tuple(
            self.linear_layers[i % len(self.linear_layers)] for i in range(self.num_layers)
        )

    @property
    def layers_sparsity(self) -> tuple[float, ...]:
        """The sparsity of every block's gates, num_layers entries."""
        return tuple(
            self.gate_sparsity[i % len(self.gate_sparsity)] for i in range(self.num_layers)
        )

    def with_vocabulary(self, size: int) -> ModelConfig:
        """The config of a model with another number of token ids."""
        return dataclasses.replace(self, vocab_size=size, layer_input_rows=0)

    def with_layers(self, layers: Sequence[int]) -> ModelConfig:
        """The config of a model with these blocks only, in this order.

        Each keeps its window, its kind of positions and its kind of attention. ValueError unless
        blocks without experts come first, and blocks that read keys of others after those.
        """
        dense = [layer < self.dense_layers for layer in layers]
        if dense != sorted(dense, reverse=True):
            raise ValueError(
                f"layers {list(layers)}: the first {self.dense_layers} blocks have no experts; "
                "they must come before the others"
            )
        reads = [layer >= self.num_layers - self.reading_layers for layer in layers]
        if reads != sorted(reads) or (layers and all(reads)):
            raise ValueError(
                f"layers {list(layers)}: the last {self.reading_layers} blocks read keys and "
                "values of earlier ones, so some of those must be kept and come before them"
            )
        windows = tuple(self.layer_windows[layer] for layer in layers)
        rotate = tuple(self.layers_rotate[layer] for layer in layers)
        return dataclasses.replace(
            self,
            num_layers=len(layers),
            windows=windows,
            rotary_layers=rotate,
            linear_layers=tuple(self.layers_linear[layer] for layer in layers),
            gate_sparsity=tuple(self.layers_sparsity[layer] for layer in layers),
            dense_layers=sum(dense),
            reading_layers=sum(reads),
        )

    @property
    def blocks_with_maps(self) -> tuple[int, ...]:
        """The blocks whose attention maps follow from the hidden state that they read: linear
        attention has none, other blocks read the keys of another or several copies of the state."""
        if self.stream_copies > 1:
            return ()
        own = self.num_layers - self.reading_layers
        return tuple(i for i, linear in enumerate(self.layers_linear) if not linear and i < own)

    def why_no_maps(self, block: int) -> str:
        """The end of a message about a block that `blocks_with_maps` lacks."""
        if self.layers_linear[block]:
            return "has linear attention, which has no maps"
        if self.stream_copies > 1:
            return "reads copies of the residual stream of which hidden states hold only the first"
        return "reads the keys of another block, which its maps would need"

    @property
    def several_attentions(self) -> bool:
        """Whether the parameters of attention differ between blocks."""
        return bool(
            self.full_head_dim
            or self.full_kv_heads
            or self.full_keys_are_values
            or self.reading_layers
        )

    @property
    def key_sources(self) -> tuple[int, ...]:
        """The block whose keys and values each block sees. ValueError if one has no source."""
        own = self.num_layers - self.reading_layers
        last = {window is None: i for i, window in enumerate(self.layer_windows[:own])}
        lacking = [i for i in range(own, self.num_layers) if self._full(i) not in last]
        if lacking:
            kind = "without" if self._full(lacking[0]) else "with"
            raise ValueError(
                f"ModelConfig: block {lacking[0]} reads keys and values, but none of the first "
                f"{own} blocks, which make them, is {kind} a window like it. Keep one that is."
            )
        return tuple(i if i < own else last[self._full(i)] for i in range(self.num_layers))

    def _full(self, layer: int) -> bool:
        return self.layer_windows[layer] is None

    @property
    def stacks(self) -> dict[str, Stack]:
        """Each set of blocks that have the same parameters, by the decoder's name for it."""
        layers = range(self.num_layers)
        if self.dense_layers:
            first = self._without_experts()
            rest = tuple(layers[self.dense_layers :])
            return {
                "first_blocks": Stack(first, tuple(layers[: self.dense_layers])),
                "blocks": Stack(self.with_layers(rest), rest),
            }
        if self.several_attentions:
            return self._stacks_by_attention()
        linear = tuple(layer for layer in layers if self.layers_linear[layer])
        others = tuple(layer for layer in layers if not self.layers_linear[layer])
        both = {"linear_blocks": linear, "blocks": others}
        return {name: Stack(self.with_layers(of), of) for name, of in both.items() if of}

    def _stacks_by_attention(self) -> dict[str, Stack]:
        """Blocks with a window, those without, and of either those that read keys and values."""
        found: dict[str, list[int]] = {}
        for layer, source in enumerate(self.key_sources):
            name = ("full_" if self._full(layer) else "window_") + (
                "reading_blocks" if source != layer else "blocks"
            )
            found.setdefault(name, []).append(layer)
        return {name: Stack(self._of_kind(name, of), tuple(of)) for name, of in found.items()}

    def _of_kind(self, name: str, layers: Sequence[int]) -> ModelConfig:
        """The config of blocks that are alike, without fields that tell them from others."""
        full, reading = name.startswith("full_"), name.endswith("reading_blocks")
        factor = self.reading_mlp_factor if reading else 1
        wide = "shared_intermediate_size" if self.expert_norms else "intermediate_size"
        return dataclasses.replace(
            self,
            num_layers=len(layers),
            windows=tuple(self.layer_windows[layer] for layer in layers),
            rotary_layers=tuple(self.layers_rotate[layer] for layer in layers),
            gate_sparsity=tuple(self.layers_sparsity[layer] for layer in layers),
            head_dim=self.full_head_dim or self.head_dim if full else self.head_dim,
            num_kv_heads=self.full_kv_heads or self.num_kv_heads if full else self.num_kv_heads,
            full_head_dim=0,
            full_kv_heads=0,
            full_keys_are_values=full and self.full_keys_are_values,
            reading_layers=len(layers) if reading else 0,
            reading_mlp_factor=1,
            **{wide: getattr(self, wide) * factor},
        )

    def _without_experts(self) -> ModelConfig:
        """The config of the first blocks, which have no experts."""
        return dataclasses.replace(
            self,
            num_layers=self.dense_layers,
            windows=self.layer_windows[: self.dense_layers],
            rotary_layers=self.layers_rotate[: self.dense_layers],
            intermediate_size=self.dense_intermediate_size,
            num_experts=0,
            router_bias=False,
            router_correction=False,
            expert_groups=1,
            groups_per_token=1,
            group_votes=2,
            shared_intermediate_size=0,
            dense_layers=0,
        )

    def identity(self) -> dict[str, Any]:
        """The fields that enter ids such as teacher_id: equal for equal functions.

        A field added in a later release is left out while it has its default, so that older ids
        stay valid.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name in _ALWAYS_IN_IDENTITY or getattr(self, name) != defaults[name]
        }


class Stack(NamedTuple):
    """Blocks whose parameters lie in common arrays, with a leading axis of layers."""

    config: ModelConfig
    """Of these blocks alone."""
    layers: tuple[int, ...]
    """Their numbers, ascending."""


def shortest_cycle(items: Sequence[Item]) -> tuple[Item, ...]:
    """The shortest prefix that, repeated and cut to length, equals `items`.

    >>> shortest_cycle([4, None, 4])
    (4, None)
    """
    for length in range(1, len(items) + 1):
        if all(item == items[i % length] for i, item in enumerate(items)):
            return tuple(items[:length])
    return tuple(items)
