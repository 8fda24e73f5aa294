"""Gemma 3's text models: Gemma 2 with norms on queries and keys, and two rotary bases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import json_fields
from decant.models.families.family import Family
from decant.models.families.field_reader import FieldReader
from decant.models.families.gemma_fields import gemma_tensors, read_gemma, write_gemma
from decant.models.families.gemma_gguf import GEMMA3_GGUF
from decant.models.families.typed_rotary import read_typed_rotary
from decant.models.families.windows import period_of, read_windows


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read the config.json of a Gemma 3 text model."""
    reader = FieldReader("config.json", fields)
    reader.require("use_qk_norm", True)
    saved_again = reader.size("_sliding_window_pattern", 6, of="num_layers")
    period = reader.size("sliding_window_pattern", saved_again, of="num_layers")
    count = reader.size("num_hidden_layers", of="num_layers")
    types = period_of(period, layers=count)
    config = ModelConfig(
        **read_gemma(reader, scores_cap=None, logits_cap=None),
        **read_typed_rotary(
            reader, theta=1e6, window_theta=reader.number("rope_local_base_freq", 1e4)
        ),
        windows=read_windows(
            reader, window=reader.window("sliding_window", 4096), default_types=types
        ),
        qk_norm=True,
        family="gemma3",
    )
    reader.finish()
    return config


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write the config.json of a Gemma 3 text model."""
    fields = json_fields.write_common(
        config, model_type="gemma3_text", architecture="Gemma3ForCausalLM"
    )
    local = config.rope_theta if config.window_rope_theta is None else config.window_rope_theta
    return fields | write_gemma(config) | {"rope_local_base_freq": local}


GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=gemma_tensors,
    gguf=GEMMA3_GGUF,
)
