"""Qwen 2 and 2.5: Llama with biases on queries, keys and values."""

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
    """Read Qwen 2's config.json."""
    reader = FieldReader("config.json", fields)
    reader.require("hidden_act", "silu")
    reader.ignore("qkv_bias")  # transformers ignores it in this family
    config = ModelConfig(
        **json_fields.read_common(reader),
        **json_fields.read_rotary(reader),
        windows=read_switched_windows(reader),
        qkv_bias=True,
        family="qwen2",
    )
    reader.finish()
    return config


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write Qwen 2's config.json."""
    fields = json_fields.write_common(config, model_type="qwen2", architecture="Qwen2ForCausalLM")
    return fields | write_switched_windows(config)


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Read Qwen 2's GGUF metadata."""
    reader = gguf_fields.architecture_fields(metadata)
    fields = gguf_fields.read_common(reader, metadata, tensors)
    reader.finish()
    return ModelConfig(**fields, qkv_bias=True, family="qwen2")


QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=common_tensors,
    # llama.cpp interleaves the rotary rows of Llama only.
    gguf=GgufFormat("qwen2", config_from_gguf, interleaves_rotary=False),
)
