"""OLMo 2 and 3: norms after attention and MLP only, and over all heads of queries and keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import gguf_fields, json_fields
from decant.models.families.common_tensors import common_tensors, post_norm_tensors
from decant.models.families.family import Family, GgufFormat
from decant.models.families.field_reader import FieldReader
from decant.models.families.tensor_name import TensorName
from decant.models.families.typed_rotary import read_typed_rotary
from decant.models.families.windows import (
    FULL,
    SLIDING,
    period_of,
    read_windows,
    write_windows,
)

_ALWAYS: dict[str, Any] = {
    "pre_norms": False,
    "post_norms": True,
    "qk_norm": True,
    "qk_norm_whole": True,
}
_THETA = 500_000.0
"""OLMo 3's rotary base."""


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read OLMo 2's or 3's config.json."""
    reader = FieldReader("config.json", fields)
    reader.require("hidden_act", "silu")
    common = {
        **json_fields.read_common(reader, eps=1e-5),
        **json_fields.read_biases(reader, mlp=False),
        **_ALWAYS,
    }
    if fields["model_type"] == "olmo2":
        config = ModelConfig(**common, **json_fields.read_rotary(reader), family="olmo2")
    else:
        types = period_of(4, layers=common["num_layers"])
        window = reader.window("sliding_window", 4096)
        config = ModelConfig(
            **common,
            **_read_rotary(reader),
            windows=read_windows(reader, window=window, default_types=types),
            family="olmo3",
        )
    reader.finish()
    return config


def _read_rotary(reader: FieldReader) -> dict[str, Any]:
    """OLMo 3's rotations: blocks with a window do not scale theirs."""
    theta = reader.number("rope_theta", _THETA)
    rotary = read_typed_rotary(reader, theta=_THETA, window_theta=_THETA)
    given = reader.section("rope_parameters").section(SLIDING).take("rope_theta", None)
    if theta != _THETA and given is None:
        raise reader.error(
            "rope_theta",
            theta,
            "transformers 4 uses it in all blocks, transformers 5 only in those without a window. "
            f"State rope_theta in rope_parameters, for {FULL} and {SLIDING}",
        )
    return rotary


def olmo2_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write OLMo 2's config.json."""
    fields = json_fields.write_common(config, model_type="olmo2", architecture="Olmo2ForCausalLM")
    return fields | json_fields.write_biases(config, mlp=False)


def olmo3_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write OLMo 3's config.json."""
    fields = json_fields.write_common(config, model_type="olmo3", architecture="Olmo3ForCausalLM")
    return fields | json_fields.write_biases(config, mlp=False) | write_windows(config)


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Read the GGUF metadata of OLMo 2, or of OLMo 3, which has windows."""
    reader = gguf_fields.architecture_fields(metadata)
    fields = gguf_fields.read_common(reader, metadata, tensors) | _ALWAYS
    window = reader.window("attention.sliding_window", None)
    period = [kind == SLIDING for kind in period_of(4, layers=fields["num_layers"])]
    pattern = reader.take("attention.sliding_window_pattern", period)
    reader.finish()
    if window is None:
        return ModelConfig(**fields, **gguf_fields.read_biases(tensors), family="olmo2")
    if not isinstance(pattern, list) or len(pattern) != fields["num_layers"]:
        raise reader.error(
            "attention.sliding_window_pattern", pattern, "expected true or false for each block"
        )
    windows = tuple(window if has_one else None for has_one in pattern)
    fields["window_rope_theta"] = fields["rope_theta"]
    return ModelConfig(
        **fields, **gguf_fields.read_biases(tensors), windows=windows, family="olmo3"
    )


def tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Llama's parameters, with norms after attention and MLP instead of before."""
    return common_tensors(config) | post_norm_tensors(
        "post_attention_layernorm", "post_feedforward_layernorm"
    )


_GGUF = GgufFormat("olmo2", config_from_gguf)
OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2",),
    config_from_json=config_from_json,
    config_to_json=olmo2_to_json,
    tensors=tensors,
    gguf=_GGUF,
)
OLMO3 = Family(
    name="olmo3",
    model_types=("olmo3",),
    config_from_json=config_from_json,
    config_to_json=olmo3_to_json,
    tensors=tensors,
    gguf=_GGUF,
)
