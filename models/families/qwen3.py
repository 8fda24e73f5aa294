"""Qwen 3: Llama with queries and keys normalised head by head."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import llama, qwen2
from decant.models.families.family import FieldReader, TensorName


def config_from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Qwen 3's config.json."""
    reader = FieldReader("config.json", fields)
    reader.require("hidden_act", "silu")
    reader.require("attention_bias", False)
    config = ModelConfig(
        **llama.shared_fields(reader, head_dim=128),
        **llama.rope_fields(reader),
        windows=qwen2.optional_windows(reader),
        qk_norm=True,
        family="qwen3",
    )
    reader.finish()
    return config


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Qwen 3 model."""
    fields = llama.hf_fields(config, model_type="qwen3", architecture="Qwen3ForCausalLM")
    return fields | qwen2.window_fields(config) | {"attention_bias": False}


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Qwen 3's GGUF metadata."""
    reader = llama.gguf_reader(metadata)
    fields = llama.gguf_fields(reader, metadata, tensors)
    reader.finish()
    return ModelConfig(**fields, qk_norm=True, family="qwen3")


def tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Llama's parameters and two norms a block."""
    names = llama.tensors(config)
    for name, part in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
        names[f"blocks.{name}"] = TensorName(
            f"model.layers.{{layer}}.self_attn.{part}.weight", f"blk.{{layer}}.attn_{part}.weight"
        )
    return names


QWEN3 = dataclasses.replace(
    qwen2.QWEN2,
    name="qwen3",
    model_types=("qwen3",),
    gguf_architectures=("qwen3",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    config_from_gguf=config_from_gguf,
    tensors=tensors,
)
