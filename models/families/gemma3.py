"""Gemma 3, text: Gemma 2 with normalised queries and keys, and two rotary bases."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import gemma2, layers, llama, qwen3
from decant.models.families.family import FieldReader, TensorName


def config_from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Gemma 3's config.json, of the text model alone."""
    if fields.get("model_type") == "gemma3":
        raise ValueError(
            "config.json: model_type is 'gemma3', a model of images and text; only its text model, "
            "saved as 'gemma3_text' (what Gemma3ForCausalLM writes), can be run."
        )
    reader = FieldReader("config.json", fields)
    period = reader.take("sliding_window_pattern", reader.take("_sliding_window_pattern", 6))
    count = reader.take("num_hidden_layers")
    kinds = [layers.SLIDING if (i + 1) % period else layers.FULL for i in range(count)]
    config = ModelConfig(
        **gemma2.gemma_fields(reader, scores_cap=None, logits_cap=None),
        **_rope_fields(reader),
        windows=layers.windows(reader, window=reader.take("sliding_window", 4096), otherwise=kinds),
        qk_norm=True,
        family="gemma3",
    )
    reader.finish()
    return config


def _rope_fields(reader: FieldReader) -> dict[str, Any]:
    """Both bases: transformers 5 keeps a rotation by kind of block, 4 the scaled one apart."""
    theta, local = reader.take("rope_theta", 1e6), reader.take("rope_local_base_freq", 1e4)
    longest = reader.take("max_position_embeddings")
    old = FieldReader(f"{reader.where}: rope_scaling", reader.take("rope_scaling", {}))
    scaling = llama.read_scaling(old, max_positions=longest)
    kinds = FieldReader(f"{reader.where}: rope_parameters", reader.take("rope_parameters", {}))
    full, sliding = (
        FieldReader(f"{kinds.where}: {kind}", kinds.take(kind, {}))
        for kind in (layers.FULL, layers.SLIDING)
    )
    kinds.finish()
    theta, local = full.take("rope_theta", theta), sliding.take("rope_theta", local)
    scaling = llama.read_scaling(full, max_positions=longest) or scaling
    sliding.require("rope_type", "default")
    sliding.finish()
    return {
        "rope_theta": float(theta),
        "rope_scaling": scaling,
        "window_rope_theta": float(local),
    }


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Gemma 3 text model."""
    fields = llama.hf_fields(config, model_type="gemma3_text", architecture="Gemma3ForCausalLM")
    local = config.rope_theta if config.window_rope_theta is None else config.window_rope_theta
    return fields | gemma2.gemma_hf_fields(config) | {"rope_local_base_freq": local}


def tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Gemma 2's parameters and Qwen 3's two norms a block."""
    names = gemma2.tensors(config)
    ours = qwen3.tensors(config)
    return names | {name: ours[name] for name in ("blocks.query_norm", "blocks.key_norm")}


GEMMA3 = dataclasses.replace(
    gemma2.GEMMA2,
    name="gemma3",
    model_types=("gemma3_text", "gemma3"),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tensors=tensors,
)
