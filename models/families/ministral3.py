"""Ministral 3: Mistral whose queries grow with their position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import json_fields
from decant.models.families.common_tensors import common_tensors
from decant.models.families.family import Family
from decant.models.families.field_reader import FieldReader

_GROWTH, _ORIGINAL = "llama_4_scaling_beta", "original_max_position_embeddings"
# The rotation of a config that states none.
_DEFAULT = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    _ORIGINAL: 16384,
    _GROWTH: 0.1,
}


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read Ministral 3's config.json."""
    outer = FieldReader("config.json", fields)
    names = [name for name in ("rope_scaling", "rope_parameters") if fields.get(name)]
    rope = outer.section(names[0]) if names else FieldReader("config.json: its default", _DEFAULT)
    beta = None if rope.take(_GROWTH, 0) == 0 else float(rope.number(_GROWTH))
    longest = outer.size("max_position_embeddings", of="max_positions")
    length = rope.size(_ORIGINAL, longest, of="max_positions")

    plain = {name: value for name, value in rope.fields.items() if name != _GROWTH}
    rotations = dict.fromkeys(names or ["rope_parameters"], plain)
    reader = FieldReader("config.json", {**fields, **rotations})
    reader.require("hidden_act", "silu")
    config = ModelConfig(
        **json_fields.read_common(reader),
        **json_fields.read_rotary(reader),
        windows=(reader.window("sliding_window", None),),
        query_growth=None if beta is None else (beta, length),
        family="ministral3",
    )
    reader.finish()
    return config


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write Ministral 3's config.json, in the spelling of transformers 5: 4 does not know it."""
    fields = json_fields.write_common(
        config, model_type="ministral3", architecture="Ministral3ForCausalLM"
    )
    rope = {"rope_theta": fields.pop("rope_theta"), "rope_type": "default"}
    rope |= fields.pop("rope_scaling") or {}
    beta, length = config.query_growth or (0.0, config.max_positions)
    rope |= {_GROWTH: beta, _ORIGINAL: length}
    return fields | {"rope_parameters": rope, "sliding_window": config.windows[0]}


MINISTRAL3 = Family(
    name="ministral3",
    model_types=("ministral3",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=common_tensors,
)
