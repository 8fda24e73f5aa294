"""GLM-4.5 and later: a sigmoid router that is corrected, a shared expert, dense first blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import json_fields
from decant.models.families.common_tensors import block_tensor, common_tensors, expert_tensors
from decant.models.families.family import Family
from decant.models.families.field_reader import FieldReader
from decant.models.families.tensor_name import TensorName

_MATRICES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_PART = "partial_rotary_factor"


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read GLM-4.5's config.json."""
    reader = FieldReader("config.json", {_PART: 0.5, **fields})
    reader.require("hidden_act", "silu")
    # Layers that guess tokens further ahead; their tensors are left out, see `redundant` below.
    reader.ignore("num_nextn_predict_layers", "num_mtp_layers")
    sizes = json_fields.read_common(reader, eps=1e-5)
    dense = reader.take("first_k_dense_replace", 1)
    if type(dense) is not int or not 0 <= dense < sizes["num_layers"]:
        raise reader.error("first_k_dense_replace", dense, "expected less than all layers")
    width = reader.size("moe_intermediate_size", 1408, of="intermediate_size")
    config = ModelConfig(
        **sizes
        | {"intermediate_size": width, "dense_intermediate_size": sizes["intermediate_size"]},
        **json_fields.read_rotary(reader, head_dim=sizes["head_dim"]),
        qkv_bias=reader.flag("attention_bias", False),
        qk_norm=reader.flag("use_qk_norm", False),
        num_experts=reader.size("n_routed_experts", 128, of="num_experts"),
        experts_per_token=reader.size("num_experts_per_tok", 8, of="experts_per_token"),
        normalise_experts=reader.flag("norm_topk_prob", True),
        router="sigmoid",
        router_correction=True,
        expert_groups=reader.size("n_group", 1, of="num_experts"),
        groups_per_token=reader.size("topk_group", 1, of="num_experts"),
        expert_multiplier=float(reader.number("routed_scaling_factor", 1.0)),
        shared_intermediate_size=width * reader.size("n_shared_experts", 1, of="num_experts"),
        dense_layers=dense,
        family="glm4_moe",
    )
    reader.finish()
    return config


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write GLM-4.5's config.json."""
    fields = json_fields.write_common(
        config, model_type="glm4_moe", architecture="Glm4MoeForCausalLM"
    )
    return (
        {_PART: 1.0}
        | fields
        | {
            "attention_bias": config.qkv_bias,
            "use_qk_norm": config.qk_norm,
            "intermediate_size": config.dense_intermediate_size or config.intermediate_size,
            "moe_intermediate_size": config.intermediate_size,
            "n_routed_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            "norm_topk_prob": config.normalise_experts,
            "n_group": config.expert_groups,
            "topk_group": config.groups_per_token,
            "routed_scaling_factor": config.expert_multiplier,
            "n_shared_experts": config.shared_intermediate_size // config.intermediate_size,
            "first_k_dense_replace": config.dense_layers,
            "num_nextn_predict_layers": 0,
        }
    )


def tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Llama's parameters; experts with a shared one in all blocks but the first."""
    *first, rest = config.stacks
    names = common_tensors(rest) | expert_tensors("mlp", _MATRICES)
    correction = block_tensor("mlp.gate", kind="e_score_correction_bias")
    names["blocks.router_correction_bias"] = correction
    for name, file in _MATRICES.items():
        names[f"blocks.shared_{name}"] = block_tensor(f"mlp.shared_experts.{file}", in_axes=1)
    return in_stacks(names, [common_tensors(stack) for stack in first], config.dense_layers)


def in_stacks(
    names: dict[str, TensorName], first: list[dict[str, TensorName]], count: int
) -> dict[str, TensorName]:
    """Names whose blocks begin at layer `count`, and those of the blocks before them."""
    blocks = {
        path: dataclasses.replace(name, first_layer=count) if path.startswith("blocks.") else name
        for path, name in names.items()
    }
    early = [(p, n) for stack in first for p, n in stack.items() if p.startswith("blocks.")]
    return blocks | {f"first_{path}": name for path, name in early}


GLM4_MOE = Family(
    name="glm4_moe",
    model_types=("glm4_moe",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=tensors,
    redundant=(*Family.redundant, r"model\.layers\.{layers}\..*"),
)
