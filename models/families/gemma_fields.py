"""The config.json fields that Gemma 2 and 3 spell alike, and the tensors both have."""

from __future__ import annotations

from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import json_fields
from decant.models.families.common_tensors import (
    block_tensor,
    common_tensors,
    post_norm_tensors,
)
from decant.models.families.field_reader import FieldReader
from decant.models.families.tensor_name import TensorName
from decant.models.families.windows import write_windows

# True of every Gemma model, so config.json does not state it.
ALWAYS = {
    "post_norms": True,
    "norm_adds_one": True,
    "scale_embedding": True,
    "activation": "gelu_tanh",
}


def read_gemma(
    reader: FieldReader, *, scores_cap: float | None, logits_cap: float | None
) -> dict[str, Any]:
    """All but rotary fields and windows, as ModelConfig arguments.

    `scores_cap` and `logits_cap` are the family's default soft caps; None is no cap.
    """
    # Earlier configs have both spellings; hidden_activation is the one that counts.
    reader.require("hidden_activation", "gelu_pytorch_tanh")
    reader.require("hidden_act", "gelu_pytorch_tanh")
    reader.require("attention_bias", False)
    reader.require("use_bidirectional_attention", False)
    reader.require("use_sliding_window", True)
    return {
        **json_fields.read_common(reader, head_dim=256, tied=True),
        **ALWAYS,
        "query_scalar": float(reader.number("query_pre_attn_scalar", 256)),
        "attention_softcap": reader.cap("attn_logit_softcapping", scores_cap),
        "final_softcap": reader.cap("final_logit_softcapping", logits_cap),
    }


def write_gemma(config: ModelConfig) -> dict[str, Any]:
    """Inverse of `read_gemma`, and of the windows; without the fields of `write_common`."""
    scalar = config.head_dim if config.query_scalar is None else config.query_scalar
    return write_windows(config) | {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": int(scalar),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
    }


def gemma_tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Llama's parameters, and a norm after attention and MLP as well as before."""
    return (
        common_tensors(config)
        | {"blocks.mlp_norm": block_tensor("pre_feedforward_layernorm", "ffn_norm")}
        | post_norm_tensors("post_attention_layernorm", "post_feedforward_layernorm")
    )
