"""Mixtral: Mistral with a mixture of experts in every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import json_fields
from decant.models.families.common_tensors import common_tensors, expert_tensors
from decant.models.families.family import Family
from decant.models.families.field_reader import FieldReader
from decant.models.families.llama import LLAMA_GGUF
from decant.models.families.tensor_name import TensorName


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read Mixtral's config.json."""
    reader = FieldReader("config.json", fields)
    reader.require("hidden_act", "silu")
    reader.ignore("router_jitter_noise")  # in training only
    experts = reader.size("num_experts", 8, of="num_experts")
    config = ModelConfig(
        **json_fields.read_common(reader, eps=1e-5),
        **json_fields.read_rotary(reader, theta=1e6),
        windows=(reader.window("sliding_window", None),),
        num_experts=reader.size("num_local_experts", experts, of="num_experts"),
        experts_per_token=reader.size("num_experts_per_tok", 2, of="experts_per_token"),
        normalise_experts=True,
        family="mixtral",
    )
    reader.finish()
    return config


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write Mixtral's config.json."""
    fields = json_fields.write_common(
        config, model_type="mixtral", architecture="MixtralForCausalLM"
    )
    return fields | {
        "sliding_window": config.windows[0],
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
    }


def tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Llama's parameters, with a router and an MLP for each expert."""
    return common_tensors(config) | expert_tensors(
        "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}
    )


MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=tensors,
    gguf=LLAMA_GGUF,
)
