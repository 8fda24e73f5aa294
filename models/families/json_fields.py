"""The config.json fields that Llama and its relatives spell alike: sizes, rotary positions."""

from __future__ import annotations

from typing import Any

from decant.models.config import ModelConfig
from decant.models.families.field_reader import FieldReader
from decant.models.families.rotary_fields import read_scaling, write_scaling


def read_common(
    reader: FieldReader, *, head_dim: int | None = None, tied: bool = False, eps: float = 1e-6
) -> dict[str, Any]:
    """Sizes and norms as ModelConfig arguments; `read_rotary` reads the rotary fields.

    `head_dim`, `tied` and `eps` are the family's defaults. Without a default, head_dim is the width
    divided by the number of heads.
    """
    # How the weights are stored: checkpoints/safetensors_files.py reads it.
    reader.ignore("quantization_config", "compression_config")
    reader.require("rope_interleaved", False)
    reader.require("use_mrope", False)
    reader.require("is_causal", True)
    width = reader.size("hidden_size", of="hidden_size")
    heads = reader.size("num_attention_heads", of="num_heads")
    if head_dim is None and reader.take("head_dim", None) is None and width % heads:
        raise reader.error(
            "num_attention_heads", heads, f"hidden_size {width} is no multiple of it"
        )
    return {
        "vocab_size": reader.size("vocab_size", of="vocab_size"),
        "hidden_size": width,
        "intermediate_size": reader.size("intermediate_size", of="intermediate_size"),
        "num_layers": reader.size("num_hidden_layers", of="num_layers"),
        "num_heads": heads,
        "num_kv_heads": reader.size("num_key_value_heads", heads, of="num_kv_heads"),
        "head_dim": reader.size("head_dim", head_dim or max(1, width // heads), of="head_dim"),
        "norm_eps": float(reader.number("rms_norm_eps", eps)),
        "max_positions": reader.size("max_position_embeddings", of="max_positions"),
        "tie_embeddings": reader.flag("tie_word_embeddings", tied),
    }


def read_biases(reader: FieldReader, *, mlp: bool = True) -> dict[str, Any]:
    """Biases of attention, and of the MLP if the family's may have them."""
    attention = reader.flag("attention_bias", False)
    fields = {"qkv_bias": attention, "output_bias": attention}
    return fields | ({"mlp_bias": reader.flag("mlp_bias", False)} if mlp else {})


def write_biases(config: ModelConfig, *, mlp: bool = True) -> dict[str, Any]:
    """Inverse of `read_biases`."""
    attention = {"attention_bias": config.output_bias}
    return attention | ({"mlp_bias": config.mlp_bias} if mlp else {})


def read_rotary(
    reader: FieldReader, *, theta: float = 10_000.0, head_dim: int | None = None
) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and maybe `rotary_dim` of a model with one rotation.

    Args:
        reader: reads config.json.
        theta: the family's default base.
        head_dim: size of a head in families that honour `partial_rotary_factor`. None: the family
            turns whole heads, and another value of that field is refused.
    """
    # Transformers 5 writes rope_parameters, earlier ones rope_theta beside rope_scaling.
    theta, scaling = reader.number("rope_theta", theta), None
    part = reader.number("partial_rotary_factor", 1.0) if head_dim else 1.0
    longest = reader.size("max_position_embeddings", of="max_positions")
    # Phi-3 writes it beside rope_scaling, where it counts more than the one inside.
    original = reader.take("original_max_position_embeddings", None)
    if original is not None:
        original = reader.size("original_max_position_embeddings", of="max_positions")
    for name in ("rope_scaling", "rope_parameters"):
        rope = reader.section(name)
        theta = rope.number("rope_theta", theta)
        part = rope.number("partial_rotary_factor", part) if head_dim else part
        both = scaling, read_scaling(rope, max_positions=longest, original=original)
        # Transformers 5 goes by rope_scaling, other programs by rope_parameters.
        if None not in both and both[0] != both[1]:
            raise ValueError(f"{reader.where}: rope_scaling and rope_parameters differ.")
        scaling = both[1] or both[0]
    rotation: dict[str, Any] = {"rope_theta": float(theta), "rope_scaling": scaling}
    return rotation | ({"rotary_dim": int(head_dim * part)} if head_dim else {})


def write_common(config: ModelConfig, *, model_type: str, architecture: str) -> dict[str, Any]:
    """Inverse of `read_common` and `read_rotary`.

    `architecture` is the transformers class that runs the model.
    """
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu" if config.activation == "silu" else "gelu_pytorch_tanh",
        # Both transformers 4 and 5 read this spelling.
        "rope_theta": config.rope_theta,
        "rope_scaling": write_scaling(config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
    } | _write_part(config)


def _write_part(config: ModelConfig) -> dict[str, float]:
    if config.rotary_dim is None:
        return {}
    return {"partial_rotary_factor": config.rotary_dim / config.head_dim}
