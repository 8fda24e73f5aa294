"""Gemma 2: capped scores and logits, a window in every other block, norms on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import json_fields
from decant.models.families.family import Family
from decant.models.families.field_reader import FieldReader
from decant.models.families.gemma_fields import gemma_tensors, read_gemma, write_gemma
from decant.models.families.gemma_gguf import GEMMA2_GGUF
from decant.models.families.windows import FULL, SLIDING, read_windows


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read Gemma 2's config.json."""
    reader = FieldReader("config.json", fields)
    window = reader.window("sliding_window", 4096)
    reader.require("sliding_window_size", window)
    pairs = [SLIDING, FULL] * reader.size("num_hidden_layers", of="num_layers")
    config = ModelConfig(
        **read_gemma(reader, scores_cap=50.0, logits_cap=30.0),
        **json_fields.read_rotary(reader),
        windows=read_windows(reader, window=window, default_types=pairs[: len(pairs) // 2]),
        family="gemma2",
    )
    reader.finish()
    return config


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write Gemma 2's config.json."""
    fields = json_fields.write_common(config, model_type="gemma2", architecture="Gemma2ForCausalLM")
    return fields | write_gemma(config)


GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=gemma_tensors,
    gguf=GEMMA2_GGUF,
)
