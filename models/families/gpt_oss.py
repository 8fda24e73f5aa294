"""gpt-oss: attention sinks, alternating windows, clamped experts that lie in one tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import gguf_fields, json_fields
from decant.models.families.common_tensors import block_tensor, common_tensors
from decant.models.families.family import Family, GgufFormat
from decant.models.families.field_reader import FieldReader
from decant.models.families.tensor_name import Naming, Part, TensorName
from decant.models.families.windows import FULL, SLIDING, read_windows, write_windows
from decant.models.rotary import YarnScaling

_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_ALWAYS: dict[str, Any] = {
    "attention_sinks": True,
    "normalise_experts": True,
    "router_bias": True,
    "mlp_bias": True,
    "activation": "clamped_swish",
    "family": "gpt_oss",
}
_LIMIT = 7.0
"""What the experts' gates and values are clamped to, see `decoder/activations.py`."""


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read gpt-oss's config.json."""
    if not fields.get("rope_scaling") and not fields.get("rope_parameters"):
        fields = {**fields, "rope_parameters": _ROPE}
    reader = FieldReader("config.json", fields)
    reader.require("hidden_act", "silu")
    reader.require("swiglu_limit", _LIMIT)
    # Other programs' names of num_experts_per_tok and of a length that rope_scaling has.
    reader.ignore("experts_per_token", "initial_context_length")
    count = reader.size("num_hidden_layers", of="num_layers")
    biases = reader.flag("attention_bias", True)
    experts = reader.size("num_experts", 128, of="num_experts")
    config = ModelConfig(
        **json_fields.read_common(reader, head_dim=64, eps=1e-5),
        **json_fields.read_rotary(reader, theta=150_000.0),
        windows=read_windows(
            reader,
            window=reader.window("sliding_window", 128),
            default_types=[FULL if i % 2 else SLIDING for i in range(count)],
        ),
        qkv_bias=biases,
        output_bias=biases,
        num_experts=reader.size("num_local_experts", experts, of="num_experts"),
        experts_per_token=reader.size("num_experts_per_tok", 4, of="experts_per_token"),
        **_ALWAYS,
    )
    reader.finish()
    return config


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write gpt-oss's config.json."""
    fields = json_fields.write_common(
        config, model_type="gpt_oss", architecture="GptOssForCausalLM"
    )
    fields |= write_windows(config) | json_fields.write_biases(config, mlp=False)
    return fields | {
        "hidden_act": "silu",
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "swiglu_limit": _LIMIT,
    }


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Read gpt-oss's GGUF metadata: a window in every other block, from the first.

    They do not say that the ends of YaRN's ramp are no whole numbers, as in all published models.
    """
    reader = gguf_fields.architecture_fields(metadata)
    fields = gguf_fields.read_common(reader, metadata, tensors)
    if isinstance(fields["rope_scaling"], YarnScaling):
        fields["rope_scaling"] = dataclasses.replace(fields["rope_scaling"], truncate=False)
    fields["intermediate_size"] = reader.size("expert_feed_forward_length", of="intermediate_size")
    reader.require("attention.sliding_window_pattern", 2)
    config = ModelConfig(
        **fields,
        windows=(reader.size("attention.sliding_window", of="windows"), None),
        qkv_bias=True,
        output_bias=True,
        num_experts=reader.size("expert_count", of="num_experts"),
        experts_per_token=reader.size("expert_used_count", of="experts_per_token"),
        **_ALWAYS,
    )
    reader.finish()
    return config


def tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Llama's parameters with biases and sinks; one tensor has a matrix of all experts of a block.

    Gates and values take turns along the last axis of `gate_up_proj`.
    """
    names = common_tensors(config)
    norm = block_tensor("post_attention_layernorm", "post_attention_norm")
    names["blocks.mlp_norm"] = norm
    names["blocks.sink_bias"] = TensorName(
        "model.layers.{layer}.self_attn.sinks", "blk.{layer}.attn_sinks.weight"
    )
    names["blocks.router"] = block_tensor("mlp.router", "ffn_gate_inp", in_axes=1)
    names["blocks.router_bias"] = block_tensor("mlp.router", "ffn_gate_inp", kind="bias")
    width = config.intermediate_size
    for name, file, part in (
        ("gate", "gate_up_proj", Part(0, 1, 2, width)),
        ("up", "gate_up_proj", Part(1, 2, 2, width)),
        ("down", "down_proj", None),
    ):
        path = f"model.layers.{{layer}}.mlp.experts.{file}"
        gguf = f"blk.{{layer}}.ffn_{name}_exps"
        names[f"blocks.{name}"] = TensorName(
            path, f"{gguf}.weight", in_axes=1, experts=True, input_first=True, part=part
        )
        names[f"blocks.{name}_bias"] = TensorName(
            f"{path}_bias", f"{gguf}.bias", in_axes=0, experts=True, part=part
        )
    return names


def tensors_in(
    config: ModelConfig, naming: Naming, present: Collection[str]
) -> dict[str, TensorName]:
    """The same; GGUF files have gates and values apart."""
    names = tensors(config)
    if naming == "hf":
        return names
    return {path: dataclasses.replace(name, part=None) for path, name in names.items()}


GPT_OSS = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=tensors,
    tensors_in=tensors_in,
    gguf=GgufFormat("gpt-oss", config_from_gguf),
)
