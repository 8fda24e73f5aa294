"""Mistral: Llama with an attention window in every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import json_fields
from decant.models.families.common_tensors import common_tensors
from decant.models.families.family import Family
from decant.models.families.field_reader import FieldReader


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read Mistral's config.json; later versions switch the window off (null)."""
    reader = FieldReader("config.json", fields)
    reader.require("hidden_act", "silu")
    window = reader.window("sliding_window", 4096)
    reader.require("use_sliding_window", window is not None)
    config = ModelConfig(
        **json_fields.read_common(reader),
        **json_fields.read_rotary(reader),
        windows=(window,),
        family="mistral",
    )
    reader.finish()
    return config


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write Mistral's config.json."""
    fields = json_fields.write_common(
        config, model_type="mistral", architecture="MistralForCausalLM"
    )
    return fields | {"sliding_window": config.windows[0]}


# No GGUF format: Mistral's GGUF files name the architecture llama and do not mention a window.
MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=common_tensors,
)
