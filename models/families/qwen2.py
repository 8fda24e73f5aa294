"""Qwen 2 and 2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from models.config import ModelConfig
from models.families import llama
from models.families.family import FieldReader, TensorName


def config_from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Qwen 2's config.json; its sliding window is a setting that may be switched off."""
    reader = FieldReader("config.json", fields)
    config = ModelConfig(**llama.shared_fields(reader), qkv_bias=True, family="qwen2")
    reader.require("use_sliding_window", False)
    reader.ignore("sliding_window", "max_window_layers")
    kinds = set(reader.take("layer_types", ["full_attention"]))
    if kinds != {"full_attention"}:
        raise ValueError(f"config.json: layer_types holds {sorted(kinds)}; only full_attention.")
    reader.finish()
    return config


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Qwen 2 model without a sliding window."""
    fields = llama.hf_fields(config, model_type="qwen2", architecture="Qwen2ForCausalLM")
    return fields | {"use_sliding_window": False}


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Qwen 2's GGUF metadata."""
    fields = llama.gguf_fields(metadata, tensors)
    return ModelConfig(**fields, qkv_bias=True, family="qwen2")


def tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Llama's parameters and three biases a block."""
    names = llama.tensors(config)
    for name in ("query", "key", "value"):
        weight = names[f"blocks.{name}"]
        names[f"blocks.{name}_bias"] = TensorName(
            weight.hf.replace(".weight", ".bias"),
            weight.gguf.replace(".weight", ".bias"),
            in_axes=0,
        )
    return names


QWEN2 = dataclasses.replace(
    llama.LLAMA,
    name="qwen2",
    model_types=("qwen2",),
    gguf_architectures=("qwen2",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    config_from_gguf=config_from_gguf,
    tensors=tensors,
    # Only the converter of Llama permutes; Qwen's pairs stay half a head apart.
    gguf_interleaves_rotary=False,
)
