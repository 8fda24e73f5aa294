"""GLM-4.5 and later: a sigmoid router that is corrected, a shared expert, dense first blocks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import json_fields
from decant.models.families.common_tensors import common_tensors
from decant.models.families.family import Family
from decant.models.families.field_reader import FieldReader
from decant.models.families.routed_experts import (
    GUESSING_LAYERS,
    read_experts,
    routed_tensors,
    write_experts,
)

_PART = "partial_rotary_factor"
_DEFAULTS = {
    _PART: 0.5,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
}


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read GLM-4.5's config.json."""
    reader = FieldReader("config.json", {**_DEFAULTS, **fields})
    reader.require("hidden_act", "silu")
    sizes = json_fields.read_common(reader, eps=1e-5)
    config = ModelConfig(
        **read_experts(reader, sizes, dense=1),
        **json_fields.read_rotary(reader, head_dim=sizes["head_dim"]),
        qkv_bias=reader.flag("attention_bias", False),
        qk_norm=reader.flag("use_qk_norm", False),
        normalise_experts=reader.flag("norm_topk_prob", True),
        router="sigmoid",
        router_correction=True,
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
        | write_experts(config)
        | {
            "attention_bias": config.qkv_bias,
            "use_qk_norm": config.qk_norm,
            "norm_topk_prob": config.normalise_experts,
        }
    )


GLM4_MOE = Family(
    name="glm4_moe",
    model_types=("glm4_moe",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=partial(routed_tensors, others=common_tensors),
    redundant=GUESSING_LAYERS,
)
