"""The GGUF metadata that Llama and its relatives spell alike."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from decant.models.families.field_reader import FieldReader
from decant.models.rotary import (
    LinearScaling,
    Llama3Scaling,
    Scaling,
    YarnScaling,
    frequencies,
)


def architecture_fields(metadata: Mapping[str, Any]) -> FieldReader:
    """A reader of the fields that describe the file's architecture, without their prefix."""
    prefix = f"{metadata['general.architecture']}."
    ours = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    return FieldReader(f"GGUF metadata {prefix}*", ours)


def read_common(
    reader: FieldReader,
    metadata: Mapping[str, Any],
    tensors: Collection[str],
    *,
    eps: str = "attention.layer_norm_rms_epsilon",
    partly: bool = False,
) -> dict[str, Any]:
    """Sizes, norms and rotary positions as ModelConfig arguments.

    Args:
        reader: `architecture_fields(metadata)`.
        metadata: all of the file's metadata.
        tensors: names of the file's tensors; without an output matrix the embedding is tied.
        eps: the field of the norms' epsilon.
        partly: a part of each head may be turned, and the file must say how much.
    """
    heads = reader.size("attention.head_count", of="num_heads")
    width = reader.size("embedding_length", of="hidden_size")
    head_dim = reader.size("attention.key_length", max(1, width // heads), of="head_dim")
    reader.require("attention.causal", True)
    reader.require("attention.value_length", head_dim)
    if partly:
        turned = reader.size("rope.dimension_count", of="head_dim")
    else:
        reader.require("rope.dimension_count", turned := head_dim)
    theta = reader.number("rope.freq_base", 10_000.0)
    return {
        "vocab_size": reader.size("vocab_size", metadata.get("tokens", ...), of="vocab_size"),
        "hidden_size": width,
        "intermediate_size": reader.size("feed_forward_length", of="intermediate_size"),
        "num_layers": reader.size("block_count", of="num_layers"),
        "num_heads": heads,
        "num_kv_heads": reader.size("attention.head_count_kv", heads, of="num_kv_heads"),
        "head_dim": head_dim,
        "rotary_dim": turned,
        "rope_theta": theta,
        "rope_scaling": _stated_scaling(reader)
        or _llama_3_scaling(metadata, head_dim=turned, theta=theta),
        "norm_eps": reader.number(eps),
        "max_positions": reader.size("context_length", of="max_positions"),
        "tie_embeddings": "output.weight" not in tensors,
    }


def read_biases(tensors: Collection[str]) -> dict[str, Any]:
    """Which biases a model has, by the names of the file's tensors: the metadata do not say it."""
    first = {"qkv_bias": "attn_q", "output_bias": "attn_output", "mlp_bias": "ffn_up"}
    return {field: f"blk.0.{name}.bias" in tensors for field, name in first.items()}


def _stated_scaling(reader: FieldReader) -> Scaling | None:
    """The scaling that the metadata state, as llama.cpp applies it."""
    kind = reader.take("rope.scaling.type", "none")
    reader.ignore("rope.scaling.finetuned")
    if kind == "linear":
        return LinearScaling(float(reader.number("rope.scaling.factor")))
    if kind != "yarn":
        reader.require("rope.scaling.type", "none", "linear", "yarn")
        return None
    reader.require("rope.scaling.yarn_ext_factor", 1.0)
    factor = float(reader.number("rope.scaling.factor"))
    sharper = reader.number("rope.scaling.attn_factor", 1.0)
    return YarnScaling(
        factor,
        reader.size("rope.scaling.original_context_length", of="max_positions"),
        float(reader.number("rope.scaling.yarn_beta_fast", 32.0)),
        float(reader.number("rope.scaling.yarn_beta_slow", 1.0)),
        attention_factor=sharper * (0.1 * math.log(factor) + 1.0),
    )


def _llama_3_scaling(metadata: Mapping[str, Any], *, head_dim: int, theta: float) -> Scaling | None:
    """Llama 3's scaling, of which GGUF keeps only the divisor of each frequency.

    The parameters of the scaling are not in the file. But Llama 3.1 to 3.3 differ in `factor`
    only, and `factor` is the divisor of the lowest frequency.
    """
    if "rope_freqs" not in metadata:
        return None
    divisors = np.asarray(metadata["rope_freqs"], np.float32)
    plain = frequencies(head_dim=head_dim, theta=theta)
    scaling = Llama3Scaling(float(round(divisors.max(initial=1), 3)), 1.0, 4.0, 8192)
    scaled = frequencies(head_dim=head_dim, theta=theta, scaling=scaling)
    sound = divisors.shape == plain.shape and ((divisors > 0) & (divisors < np.inf)).all()
    if not sound or not np.allclose(divisors, plain / scaled, rtol=1e-4):
        raise ValueError(
            "GGUF tensor rope_freqs.weight: not the scaling of Llama 3.1 to 3.3 (low and high "
            "frequency factors 1 and 4 over 8192 positions), the only one we can tell from it. "
            "Use the model's Hugging Face directory, whose config.json states it."
        )
    return scaling
