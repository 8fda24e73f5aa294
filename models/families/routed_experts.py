"""Experts as GLM-4.5 and DeepSeek have them: in groups, shared ones, first blocks without any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families.common_tensors import block_tensor, expert_tensors, in_stacks
from decant.models.families.family import Family
from decant.models.families.field_reader import FieldReader
from decant.models.families.tensor_name import TensorName

_MATRICES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

GUESSING_LAYERS = (*Family.redundant, r"model\.layers\.{layers}\..*")
"""Tensors left out: beside the usual ones, those of a layer that guesses tokens further ahead."""


def read_experts(reader: FieldReader, sizes: dict[str, Any], *, dense: int) -> dict[str, Any]:
    """ModelConfig arguments: `sizes`, as `read_common` gives them, and all that experts add.

    `dense` is how many blocks have no experts if first_k_dense_replace does not say.
    """
    reader.require("moe_layer_freq", 1)
    # Of layers that guess, and how experts are balanced and spread over devices in training.
    reader.ignore("num_nextn_predict_layers", "num_mtp_layers", "seq_aux", "ep_size")
    dense = reader.take("first_k_dense_replace", dense)
    if type(dense) is not int or not 0 <= dense < sizes["num_layers"]:
        raise reader.error("first_k_dense_replace", dense, "expected less than all layers")
    width = reader.size("moe_intermediate_size", of="intermediate_size")
    return {
        **sizes,
        "intermediate_size": width,
        "dense_intermediate_size": sizes["intermediate_size"],
        "num_experts": reader.size("n_routed_experts", of="num_experts"),
        "experts_per_token": reader.size("num_experts_per_tok", of="experts_per_token"),
        "expert_groups": reader.size("n_group", 1, of="num_experts"),
        "groups_per_token": reader.size("topk_group", 1, of="num_experts"),
        "expert_multiplier": float(reader.number("routed_scaling_factor", 1.0)),
        "shared_intermediate_size": width * reader.size("n_shared_experts", 1, of="num_experts"),
        "dense_layers": dense,
    }


def write_experts(config: ModelConfig) -> dict[str, Any]:
    """Inverse of `read_experts`; the fields replace those of `write_common`."""
    return {
        "intermediate_size": config.dense_intermediate_size or config.intermediate_size,
        "moe_intermediate_size": config.intermediate_size,
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "n_group": config.expert_groups,
        "topk_group": config.groups_per_token,
        "routed_scaling_factor": config.expert_multiplier,
        "n_shared_experts": config.shared_intermediate_size // config.intermediate_size,
        "first_k_dense_replace": config.dense_layers,
        "num_nextn_predict_layers": 0,
    }


def routed_tensors(
    config: ModelConfig, others: Callable[[ModelConfig], dict[str, TensorName]]
) -> dict[str, TensorName]:
    """Experts with a shared one in all blocks but the first; `others` names what is no expert's."""
    stacks = config.stacks
    names = others(stacks["blocks"].config) | expert_tensors("mlp", _MATRICES)
    if config.router_correction:
        names["blocks.router_correction_bias"] = TensorName(
            "model.layers.{layer}.mlp.gate.e_score_correction_bias", "blk.{layer}.exp_probs_b.bias"
        )
    for name, file in _MATRICES.items():
        shared = block_tensor(f"mlp.shared_experts.{file}", f"ffn_{name}_shexp", in_axes=1)
        names[f"blocks.shared_{name}"] = shared
    each = {"blocks": names}
    if "first_blocks" in stacks:
        each["first_blocks"] = others(stacks["first_blocks"].config)
    return in_stacks(each, config)
