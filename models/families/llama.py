"""Llama 2 to 3.2, and models that are Llama by another name (SmolLM)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import gguf_fields, json_fields
from decant.models.families.common_tensors import common_tensors
from decant.models.families.family import Family, GgufFormat
from decant.models.families.field_reader import FieldReader


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read Llama's config.json."""
    reader = FieldReader("config.json", fields)
    reader.require("hidden_act", "silu")
    config = ModelConfig(
        **json_fields.read_common(reader),
        **json_fields.read_biases(reader),
        **json_fields.read_rotary(reader),
    )
    if reader.flag("use_sliding_window", True):
        reader.require("sliding_window", None)
    reader.ignore("sliding_window")
    reader.finish()
    return config


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write Llama's config.json."""
    fields = json_fields.write_common(config, model_type="llama", architecture="LlamaForCausalLM")
    return fields | json_fields.write_biases(config)


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Read Llama's GGUF metadata, or Mixtral's, which have experts."""
    reader = gguf_fields.architecture_fields(metadata)
    fields = gguf_fields.read_common(reader, metadata, tensors)
    if reader.take("expert_count", 0):
        fields |= {
            "num_experts": reader.size("expert_count", of="num_experts"),
            "experts_per_token": reader.size("expert_used_count", of="experts_per_token"),
            "normalise_experts": True,
            "family": "mixtral",
        }
    else:
        reader.require("expert_used_count", 0)
        fields |= gguf_fields.read_biases(tensors)
    reader.finish()
    return ModelConfig(**fields)


LLAMA_GGUF = GgufFormat("llama", config_from_gguf, interleaves_rotary=True)
"""Of Llama's files and of Mixtral's, which name the same architecture."""
LLAMA = Family(
    name="llama",
    model_types=("llama",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=common_tensors,
    gguf=LLAMA_GGUF,
)
