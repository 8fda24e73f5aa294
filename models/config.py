"""The shape of a decoder: everything that decides which function the weights compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


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
    """Name of the module in `models.families` that reads and writes this model's files."""

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

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face `config.json`; a field that we would not honour is an error."""
        from models import families  # the families build on this module

        return families.for_model_type(fields.get("model_type")).config_from_hf(fields)

    def to_hf(self) -> dict[str, Any]:
        """Write the `config.json` that `from_hf` and Hugging Face transformers read back."""
        from models import families

        return families.named(self.family).config_to_hf(self)
