"""Qwen 3: Llama with a norm on each head's queries and keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import gguf_fields, json_fields
from decant.models.families.common_tensors import common_tensors
from decant.models.families.family import Family, GgufFormat
from decant.models.families.field_reader import FieldReader
from decant.models.families.windows import read_switched_windows, write_switched_windows


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read Qwen 3's config.json."""
    reader = FieldReader("config.json", fields)
    reader.require("hidden_act", "silu")
    reader.require("attention_bias", False)
    reader.require("use_qk_norm", True)
    config = ModelConfig(
        **json_fields.read_common(reader, head_dim=128),
        **json_fields.read_rotary(reader),
        windows=read_switched_windows(reader),
        qk_norm=True,
        family="qwen3",
    )
    reader.finish()
    return config


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write Qwen 3's config.json."""
    fields = json_fields.write_common(config, model_type="qwen3", architecture="Qwen3ForCausalLM")
    return fields | write_switched_windows(config) | {"attention_bias": False}


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Read Qwen 3's GGUF metadata."""
    reader = gguf_fields.architecture_fields(metadata)
    fields = gguf_fields.read_common(reader, metadata, tensors)
    reader.finish()
    return ModelConfig(**fields, qk_norm=True, family="qwen3")


QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=common_tensors,
    gguf=GgufFormat("qwen3", config_from_gguf),
)
