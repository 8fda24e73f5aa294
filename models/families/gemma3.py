"""Gemma 3's text models: Gemma 2 with norms on queries and keys, and two rotary bases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import json_fields
from decant.models.families.common_tensors import qk_norm_tensors
from decant.models.families.family import Family
from decant.models.families.field_reader import FieldReader
from decant.models.families.gemma_fields import gemma_tensors, read_gemma, write_gemma
from decant.models.families.rotary_fields import read_scaling
from decant.models.families.tensor_name import TensorName
from decant.models.families.windows import FULL, SLIDING, read_windows


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read Gemma 3's config.json, of a text model only."""
    if fields.get("model_type") == "gemma3":
        raise ValueError(
            "config.json: model_type is 'gemma3', a model of images and text; only its text model, "
            "saved as 'gemma3_text' (what Gemma3ForCausalLM writes), can be run."
        )
    reader = FieldReader("config.json", fields)
    reader.require("use_qk_norm", True)
    saved_again = reader.size("_sliding_window_pattern", 6, of="num_layers")
    period = reader.size("sliding_window_pattern", saved_again, of="num_layers")
    count = reader.size("num_hidden_layers", of="num_layers")
    types = [SLIDING if (i + 1) % period else FULL for i in range(count)]
    config = ModelConfig(
        **read_gemma(reader, scores_cap=None, logits_cap=None),
        **_read_rotary(reader),
        windows=read_windows(
            reader, window=reader.window("sliding_window", 4096), default_types=types
        ),
        qk_norm=True,
        family="gemma3",
    )
    reader.finish()
    return config


def _read_rotary(reader: FieldReader) -> dict[str, Any]:
    """The rotation of blocks with full attention, and the base of those with a window.

    Transformers 5 writes both in `rope_parameters`, by type of block. Transformers 4 writes
    `rope_theta` and `rope_scaling` for full attention, and `rope_local_base_freq` for windows.
    """
    theta, local = reader.number("rope_theta", 1e6), reader.number("rope_local_base_freq", 1e4)
    longest = reader.size("max_position_embeddings", of="max_positions")
    scaling = read_scaling(reader.section("rope_scaling"), max_positions=longest)
    kinds = reader.section("rope_parameters")
    full, sliding = kinds.section(FULL), kinds.section(SLIDING)
    kinds.finish()
    theta, local = full.number("rope_theta", theta), sliding.number("rope_theta", local)
    scaling = read_scaling(full, max_positions=longest) or scaling
    sliding.require("rope_type", "default")
    sliding.finish()
    return {
        "rope_theta": float(theta),
        "rope_scaling": scaling,
        "window_rope_theta": float(local),
    }


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write the config.json of a Gemma 3 text model."""
    fields = json_fields.write_common(
        config, model_type="gemma3_text", architecture="Gemma3ForCausalLM"
    )
    local = config.rope_theta if config.window_rope_theta is None else config.window_rope_theta
    return fields | write_gemma(config) | {"rope_local_base_freq": local}


def tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Gemma 2's parameters, and the norms of queries and keys."""
    return gemma_tensors(config) | qk_norm_tensors()


GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text", "gemma3"),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=tensors,
)
