"""Qwen 2 and 2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import layers, llama
from decant.models.families.family import FieldReader, TensorName


def config_from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Qwen 2's config.json."""
    reader = FieldReader("config.json", fields)
    reader.require("hidden_act", "silu")
    reader.require("use_mrope", False)
    config = ModelConfig(
        **llama.shared_fields(reader),
        **llama.rope_fields(reader),
        windows=optional_windows(reader),
        qkv_bias=True,
        family="qwen2",
    )
    reader.finish()
    return config


def optional_windows(reader: FieldReader) -> tuple[int | None, ...]:
    """A window that the upper blocks have, if it is switched on at all."""
    on, window = reader.take("use_sliding_window", False), reader.take("sliding_window", 4096)
    first = reader.take("max_window_layers", 28)
    count = reader.take("num_hidden_layers")
    kinds = [layers.SLIDING if on and i >= first else layers.FULL for i in range(count)]
    return layers.windows(reader, window=window if on else None, otherwise=kinds)


def window_fields(config: ModelConfig) -> dict[str, Any]:
    """Inverse of `optional_windows`."""
    fields = layers.fields(config)
    return fields | {"use_sliding_window": fields["sliding_window"] is not None}


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Qwen 2 model."""
    fields = llama.hf_fields(config, model_type="qwen2", architecture="Qwen2ForCausalLM")
    return fields | window_fields(config)


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Qwen 2's GGUF metadata."""
    reader = llama.gguf_reader(metadata)
    fields = llama.gguf_fields(reader, metadata, tensors)
    reader.finish()
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
