"""GLM-4, dense: neighbouring coordinates turned in half of each head, gate and up in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import json_fields
from decant.models.families.common_tensors import common_tensors, post_norm_tensors
from decant.models.families.family import Family
from decant.models.families.field_reader import FieldReader
from decant.models.families.fused import fuse_gate_and_up
from decant.models.families.tensor_name import TensorName

_PART = "partial_rotary_factor"
_DEFAULTS = {_PART: 0.5, "head_dim": 128, "attention_bias": True}


def _read(fields: Mapping[str, Any], *, family: str, post_norms: bool) -> ModelConfig:
    reader = FieldReader("config.json", {**_DEFAULTS, **fields})
    reader.require("hidden_act", "silu")
    sizes = json_fields.read_common(reader, eps=1.5625e-07)
    config = ModelConfig(
        **sizes,
        **json_fields.read_rotary(reader, head_dim=sizes["head_dim"]),
        qkv_bias=reader.flag("attention_bias", True),
        rotary_neighbours=True,
        post_norms=post_norms,
        family=family,
    )
    reader.finish()
    return config


def _write(config: ModelConfig, *, model_type: str, architecture: str) -> dict[str, Any]:
    fields = json_fields.write_common(config, model_type=model_type, architecture=architecture)
    # Transformers' default pad token is 151,329, which a small vocabulary lacks.
    more = {"attention_bias": config.qkv_bias, "pad_token_id": None}
    return {_PART: 1.0} | fields | more


def _tensors(config: ModelConfig) -> dict[str, TensorName]:
    names = common_tensors(config)
    if config.post_norms:
        names |= post_norm_tensors("post_self_attn_layernorm", "post_mlp_layernorm")
    return names | fuse_gate_and_up(
        names, config, hf="model.layers.{layer}.mlp.gate_up_proj.{kind}"
    )


def _family(name: str, architecture: str, *, post_norms: bool) -> Family:
    read: Callable[..., ModelConfig] = partial(_read, family=name, post_norms=post_norms)
    write = partial(_write, model_type=name, architecture=architecture)
    return Family(name, (name,), read, write, _tensors)


GLM = _family("glm", "GlmForCausalLM", post_norms=False)
GLM4 = _family("glm4", "Glm4ForCausalLM", post_norms=True)
