"""Mistral: Llama with a window that every block sees the row through."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import llama
from decant.models.families.family import FieldReader


def config_from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Mistral's config.json; later versions switch the window off (null)."""
    reader = FieldReader("config.json", fields)
    reader.require("hidden_act", "silu")
    config = ModelConfig(
        **llama.shared_fields(reader),
        **llama.rope_fields(reader),
        windows=(reader.take_or_off("sliding_window", 4096),),
        family="mistral",
    )
    reader.finish()
    return config


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Mistral model."""
    fields = llama.hf_fields(config, model_type="mistral", architecture="MistralForCausalLM")
    return fields | {"sliding_window": config.windows[0]}


MISTRAL = dataclasses.replace(
    llama.LLAMA,
    name="mistral",
    model_types=("mistral",),
    # Its GGUF files call themselves llama, and say nothing of a window.
    gguf_architectures=(),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
)
