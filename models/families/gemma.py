"""Gemma 1: Llama with a scaled embedding, norms of 1 + weight, and GELU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import json_fields
from decant.models.families.common_tensors import common_tensors
from decant.models.families.family import Family
from decant.models.families.field_reader import FieldReader
from decant.models.families.gemma_gguf import GEMMA_GGUF


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read Gemma 1's config.json."""
    reader = FieldReader("config.json", fields)
    # Of the first files, which say "gelu", transformers 4 ran the approximation by tanh that
    # Gemma was trained with; transformers 5 does not. They must be corrected.
    reader.require("hidden_act", "gelu_pytorch_tanh")
    reader.require("hidden_activation", "gelu_pytorch_tanh")
    reader.require("use_bidirectional_attention", False)
    config = ModelConfig(
        **json_fields.read_common(reader, head_dim=256, tied=True),
        **json_fields.read_biases(reader, mlp=False),
        **json_fields.read_rotary(reader),
        norm_adds_one=True,
        scale_embedding=True,
        activation="gelu_tanh",
        family="gemma",
    )
    reader.finish()
    return config


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write Gemma 1's config.json."""
    fields = json_fields.write_common(config, model_type="gemma", architecture="GemmaForCausalLM")
    return fields | json_fields.write_biases(config, mlp=False)


GEMMA = Family(
    name="gemma",
    model_types=("gemma",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=common_tensors,
    gguf=GEMMA_GGUF,
)
