"""The shape of a decoder: everything that decides which function the weights compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from decant.models.rotary import Scaling

# What a config held when the first caches were captured. Their teacher_id is made from these
# fields, so one that came later takes part only where it says something.
_ALWAYS_IN_IDENTITY = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"),
    *("num_kv_heads", "head_dim", "rope_theta", "norm_eps", "max_positions"),
    *("tie_embeddings", "qkv_bias", "family"),
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a decoder of any supported family needs to know about itself.

    Equal configs and equal weights give equal outputs; nothing here says how the
    arrays are stored, sharded or computed.
    """

    vocab_size: int
    """Rows of the embedding. May exceed the tokenizer's size (checkpoints pad it)."""
    hidden_size: int
    intermediate_size: int
    """Width of the gated MLP; of each expert, where there are experts."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Heads of keys and values; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    max_positions: int = 2048
    """Longest sequence that the weights were trained for."""
    tie_embeddings: bool = False
    """The unembedding is the embedding, transposed; no second matrix exists."""
    qkv_bias: bool = False
    family: str = "llama"
    """Name of the module in `decant.models.families` that reads and writes this model's files."""
    rope_scaling: Scaling | None = None
    windows: tuple[int | None, ...] = (None,)
    """How many positions a query sees, itself included (None: all before it); block i takes entry
    i modulo the length. Gemma 2's (4096, None) alternates."""
    window_rope_theta: float | None = None
    """Rotary base, never scaled, of the blocks that have a window; unset: theirs is the others'."""
    qk_norm: bool = False
    """Queries and keys are normalised, head by head, before they are turned."""
    post_norms: bool = False
    """What attention and MLP give is normalised before it is added to the stream."""
    norm_adds_one: bool = False
    """Norms multiply by 1 + weight."""
    scale_embedding: bool = False
    """The embedding's output is multiplied by √hidden_size."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    query_scalar: float | None = None
    """Attention scores are divided by its root; unset: head_dim."""
    attention_softcap: float | None = None
    """c: attention scores s become c·tanh(s/c)."""
    final_softcap: float | None = None
    """The same for logits. They are made in `decant.models.numerics.logits`."""
    num_experts: int = 0
    """MLPs among which each token chooses; 0: one, for all tokens."""
    experts_per_token: int = 0
    normalise_experts: bool = False
    """The chosen experts' weights are divided by their sum."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        for name in (*sizes, "num_kv_heads", "head_dim", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig.{name} is {getattr(self, name)}; it must be ≥ 1.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig: {self.num_heads} query heads cannot share {self.num_kv_heads} "
                "key/value heads evenly; num_heads must be a multiple of num_kv_heads."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"ModelConfig.head_dim is {self.head_dim}; rotary positions turn pairs of "
                "coordinates, so it must be even."
            )
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
        # One way to say it, so that equal functions have equal configs.
        object.__setattr__(self, "windows", shortest_cycle(self.layer_windows))

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of every block."""
        return tuple(self.windows[i % len(self.windows)] for i in range(self.num_layers))

    def with_layers(self, layers: Sequence[int]) -> ModelConfig:
        """The config of these blocks alone, in this order; each keeps its window."""
        windows = tuple(self.layer_windows[layer] for layer in layers)
        return dataclasses.replace(self, num_layers=len(layers), windows=windows)

    def identity(self) -> dict[str, Any]:
        """What goes into an id; equal for equal functions, and unchanged by fields that are new."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name in _ALWAYS_IN_IDENTITY or getattr(self, name) != defaults[name]
        }


def shortest_cycle(items: Sequence[int | None]) -> tuple[int | None, ...]:
    """The shortest beginning that, repeated and cut off, gives all of `items`.

    >>> shortest_cycle([4, None, 4])
    (4, None)
    """
    for length in range(1, len(items) + 1):
        if all(item == items[i % length] for i, item in enumerate(items)):
            return tuple(items[:length])
    return tuple(items)
