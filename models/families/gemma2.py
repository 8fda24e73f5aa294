"""Gemma 2: capped scores and logits, every other block with a window, norms on both sides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import layers, llama
from decant.models.families.family import FieldReader, TensorName

# What config.json does not say, because it cannot be otherwise.
ALWAYS = {
    "post_norms": True,
    "norm_adds_one": True,
    "scale_embedding": True,
    "activation": "gelu_tanh",
}


def config_from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Gemma 2's config.json."""
    reader = FieldReader("config.json", fields)
    window = reader.take("sliding_window", 4096)
    reader.require("sliding_window_size", window)
    pairs = [layers.SLIDING, layers.FULL] * reader.take("num_hidden_layers")
    config = ModelConfig(
        **gemma_fields(reader, scores_cap=50.0, logits_cap=30.0),
        **llama.rope_fields(reader),
        windows=layers.windows(reader, window=window, otherwise=pairs[: len(pairs) // 2]),
        family="gemma2",
    )
    reader.finish()
    return config


def gemma_fields(
    reader: FieldReader, *, scores_cap: float | None, logits_cap: float | None
) -> dict[str, Any]:
    """What Gemma 2 and 3 spell alike, as ModelConfig arguments; caps are the family's defaults."""
    # Earlier configs have both spellings; hidden_activation is the one that counts.
    reader.require("hidden_activation", "gelu_pytorch_tanh")
    reader.require("hidden_act", "gelu_pytorch_tanh")
    reader.require("attention_bias", False)
    reader.require("use_bidirectional_attention", False)
    return {
        **llama.shared_fields(reader, head_dim=256, tied=True),
        **ALWAYS,
        "query_scalar": float(reader.take("query_pre_attn_scalar", 256)),
        "attention_softcap": reader.take_or_off("attn_logit_softcapping", scores_cap),
        "final_softcap": reader.take_or_off("final_logit_softcapping", logits_cap),
    }


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Gemma 2 model."""
    fields = llama.hf_fields(config, model_type="gemma2", architecture="Gemma2ForCausalLM")
    return fields | gemma_hf_fields(config)


def gemma_hf_fields(config: ModelConfig) -> dict[str, Any]:
    """Inverse of `gemma_fields`, and of the windows."""
    scalar = config.head_dim if config.query_scalar is None else config.query_scalar
    return layers.fields(config) | {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": int(scalar),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
    }


def tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Llama's parameters, and a norm after attention and MLP as well as before."""
    names = llama.tensors(config)
    for name, hf in (
        ("attention_post_norm", "post_attention_layernorm"),
        ("mlp_norm", "pre_feedforward_layernorm"),
        ("mlp_post_norm", "post_feedforward_layernorm"),
    ):
        names[f"blocks.{name}"] = TensorName(f"model.layers.{{layer}}.{hf}.weight", "")
    return names


GEMMA2 = dataclasses.replace(
    llama.LLAMA,
    name="gemma2",
    model_types=("gemma2",),
    # Its GGUF files hold a SentencePiece tokenizer, which we cannot rebuild.
    gguf_architectures=(),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tensors=tensors,
)
