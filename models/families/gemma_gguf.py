"""GGUF metadata of Gemma 1, 2 and 3.

Files hold 1 + weight for each norm. What no field says, llama.cpp takes from the architecture: the
scale of the scores, the pattern of the windows, Gemma 3's rotary base inside windows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import gguf_fields
from decant.models.families.family import GgufFormat
from decant.models.families.field_reader import FieldReader

_ALWAYS = {"norm_adds_one": True, "scale_embedding": True, "activation": "gelu_tanh"}
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""Blocks of the sizes whose scores are divided by the root of width / heads, not of head_dim."""


def _common(
    metadata: Mapping[str, Any], tensors: Collection[str]
) -> tuple[FieldReader, dict[str, Any]]:
    reader = gguf_fields.architecture_fields(metadata)
    family = metadata["general.architecture"]
    return reader, gguf_fields.read_common(reader, metadata, tensors) | _ALWAYS | {"family": family}


def _query_scalar(fields: Mapping[str, Any]) -> float:
    if fields["num_layers"] == _LAYERS_OF_27B[fields["family"]]:
        return float(fields["hidden_size"] // fields["num_heads"])
    return float(fields["head_dim"])


def gemma_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Read Gemma 1's metadata."""
    reader, fields = _common(metadata, tensors)
    reader.finish()
    return ModelConfig(**fields)


def gemma2_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Read Gemma 2's metadata: a window in every other block, from the first."""
    reader, fields = _common(metadata, tensors)
    config = ModelConfig(
        **fields,
        post_norms=True,
        query_scalar=_query_scalar(fields),
        attention_softcap=float(reader.number("attn_logit_softcapping", 50.0)),
        final_softcap=float(reader.number("final_logit_softcapping", 30.0)),
        windows=(reader.window("attention.sliding_window", 4096), None),
    )
    reader.finish()
    return config


def gemma3_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Read Gemma 3's metadata: five blocks with a window, then one without, which is scaled."""
    reader, fields = _common(metadata, tensors)
    window = reader.window("attention.sliding_window", 4096)
    config = ModelConfig(
        **fields,
        post_norms=True,
        qk_norm=True,
        query_scalar=_query_scalar(fields),
        final_softcap=reader.cap("final_logit_softcapping", None),
        windows=(*[window] * 5, None),
        window_rope_theta=float(reader.number("rope.freq_base_swa", 10_000.0)),
    )
    reader.finish()
    return config


GEMMA_GGUF = GgufFormat("gemma", gemma_from_gguf, norms_with_one=True)
GEMMA2_GGUF = GgufFormat("gemma2", gemma2_from_gguf, norms_with_one=True)
GEMMA3_GGUF = GgufFormat("gemma3", gemma3_from_gguf, norms_with_one=True)
