"""Qwen 3 with a mixture of experts in every block."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import gguf_fields, json_fields
from decant.models.families.common_tensors import common_tensors, expert_tensors
from decant.models.families.family import Family, GgufFormat
from decant.models.families.field_reader import FieldReader
from decant.models.families.tensor_name import Naming, Part, TensorName


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read Qwen 3 MoE's config.json.

    Every block must have experts: a block without them could not be stacked with the others.
    """
    reader = FieldReader("config.json", fields)
    reader.require("hidden_act", "silu")
    reader.require("attention_bias", False)
    reader.require("decoder_sparse_step", 1)
    reader.require("mlp_only_layers", [])
    reader.require("use_qk_norm", True)
    reader.ignore("max_window_layers")  # transformers ignores it in this family
    sizes = json_fields.read_common(reader)
    sizes["intermediate_size"] = reader.size("moe_intermediate_size", of="intermediate_size")
    window = reader.window("sliding_window", 4096)
    on = reader.flag("use_sliding_window", False)
    experts = reader.size("num_local_experts", 128, of="num_experts")
    config = ModelConfig(
        **sizes,
        **json_fields.read_rotary(reader),
        windows=(window if on else None,),
        qk_norm=True,
        num_experts=reader.size("num_experts", experts, of="num_experts"),
        experts_per_token=reader.size("num_experts_per_tok", 8, of="experts_per_token"),
        normalise_experts=reader.flag("norm_topk_prob", False),
        family="qwen3_moe",
    )
    reader.finish()
    return config


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write Qwen 3 MoE's config.json."""
    fields = json_fields.write_common(
        config, model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM"
    )
    window = config.windows[0]
    return fields | {
        "attention_bias": False,
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.normalise_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Read Qwen 3 MoE's GGUF metadata."""
    reader = gguf_fields.architecture_fields(metadata)
    sizes = gguf_fields.read_common(reader, metadata, tensors)
    sizes["intermediate_size"] = reader.size("expert_feed_forward_length", of="intermediate_size")
    config = ModelConfig(
        **sizes,
        qk_norm=True,
        num_experts=reader.size("expert_count", of="num_experts"),
        experts_per_token=reader.size("expert_used_count", of="experts_per_token"),
        # The metadata lacks it: for this architecture llama.cpp always divides by the sum.
        normalise_experts=True,
        family="qwen3_moe",
    )
    reader.finish()
    return config


def tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Qwen 3's parameters, with a router and an MLP for each expert."""
    matrices = {name: f"{name}_proj" for name in ("gate", "up", "down")}
    return common_tensors(config) | expert_tensors("mlp", matrices)


def tensors_in(
    config: ModelConfig, naming: Naming, present: Collection[str]
) -> dict[str, TensorName]:
    """The same; files of Qwen3-VL have the matrices of all experts of a block in two tensors."""
    names, width = tensors(config), config.intermediate_size
    if naming == "gguf" or not any(name.endswith(".experts.gate_up_proj") for name in present):
        return names
    for name, file, part in (
        ("gate", "gate_up_proj", Part(0, width, 2 * width)),
        ("up", "gate_up_proj", Part(width, 2 * width, 2 * width)),
        ("down", "down_proj", None),
    ):
        path = f"model.layers.{{layer}}.mlp.experts.{file}"
        names[f"blocks.{name}"] = dataclasses.replace(
            names[f"blocks.{name}"], hf=path, input_first=True, part=part
        )
    return names


QWEN3_MOE = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=tensors,
    tensors_in=tensors_in,
    gguf=GgufFormat("qwen3moe", config_from_gguf),
)
