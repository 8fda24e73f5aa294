"""DeepSeek's latent attention in files: its fields of config.json, and its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import json_fields
from decant.models.families.common_tensors import block_tensor, common_tensors
from decant.models.families.field_reader import FieldReader
from decant.models.families.tensor_name import Part, TensorName
from decant.models.rotary import YarnScaling, usual_attention_factor

_ROTATIONS = ("rope_scaling", "rope_parameters")
_ALL = "mscale_all_dim"


def read_latent_attention(
    fields: Mapping[str, Any], *, eps: float, tied: bool = False
) -> tuple[FieldReader, dict[str, Any]]:
    """A reader of the other fields, and ModelConfig arguments: sizes, rotation and attention."""
    # Only the coordinates that are turned count as a head there.
    of_head = FieldReader("config.json", fields)
    still = of_head.size("qk_nope_head_dim", of="head_dim")
    turned = of_head.size("qk_rope_head_dim", of="head_dim")
    reader = FieldReader("config.json", {**fields, "head_dim": still + turned})
    reader.ignore("qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim")
    reader.require("hidden_act", "silu")
    reader.require("attention_bias", False)
    sizes = json_fields.read_common(reader, eps=eps, tied=tied)
    reader.require("num_key_value_heads", sizes["num_heads"])
    rotation = json_fields.read_rotary(reader)
    queries = reader.size_or_null("q_lora_rank", ..., of="query_latent_dim")
    return reader, {
        **sizes,
        **rotation,
        "rotary_dim": turned,
        "value_dim": reader.size("v_head_dim", of="value_dim"),
        "latent_dim": reader.size("kv_lora_rank", of="latent_dim"),
        "query_latent_dim": queries or 0,
        "yarn_score_scale": _read_score_scale(reader, rotation["rope_scaling"]),
    }


def _read_score_scale(reader: FieldReader, scaling: Any) -> float:
    if not isinstance(scaling, YarnScaling):
        return 0.0
    for name in _ROTATIONS:
        rope = reader.section(name)
        if rope.take(_ALL, 0) != 0:
            return float(rope.number(_ALL))
    return 0.0


def write_latent_attention(
    config: ModelConfig, *, model_type: str, architecture: str
) -> dict[str, Any]:
    """Inverse of `read_latent_attention`."""
    fields = json_fields.write_common(config, model_type=model_type, architecture=architecture)
    fields.pop("partial_rotary_factor", None)
    fields["rope_scaling"] = _with_score_scale(fields["rope_scaling"], config)
    return fields | {
        "attention_bias": False,
        "head_dim": config.turned,
        "qk_nope_head_dim": config.head_dim - config.turned,
        "qk_rope_head_dim": config.turned,
        "v_head_dim": config.value_width,
        "kv_lora_rank": config.latent_dim,
        "q_lora_rank": config.query_latent_dim or None,
    }


def _with_score_scale(rope: dict[str, Any] | None, config: ModelConfig) -> dict[str, Any] | None:
    """A scaling's fields with DeepSeek's two.

    Programs that do not know attention_factor take it for the quotient of the two's factors.
    """
    below = config.yarn_score_scale
    if rope is None or not below:
        return rope
    factor, growth = rope["attention_factor"], usual_attention_factor(rope["factor"], 1.0) - 1
    # 1 + above · growth = factor · (1 + below · growth)
    above = below if factor == 1 else below * factor + (factor - 1) / growth
    return rope | {"mscale": above, _ALL: below}


def latent_tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Llama's parameters with latent attention; two maps hold several parameters each."""
    names = common_tensors(config)
    latent, turned, heads = config.latent_dim, config.turned, config.num_heads
    still, width = config.head_dim - turned, config.head_dim - turned + config.value_width
    first, second = ("kv_a_proj_with_mqa", "attn_kv_a_mqa"), ("kv_b_proj", "attn_kv_b")
    for name, (file, gguf), part in (
        ("latent", first, Part(0, latent, latent + turned)),
        ("turned_key", first, Part(latent, latent + turned, latent + turned)),
        ("key", second, Part(0, still, width, heads)),
        ("value", second, Part(still, width, width, heads)),
    ):
        names[f"blocks.{name}"] = block_tensor(f"self_attn.{file}", gguf, in_axes=1, part=part)
    norms = {"latent_norm": ("kv_a_layernorm", "attn_kv_a_norm")}
    matrices = {}
    if config.query_latent_dim:
        norms["query_latent_norm"] = ("q_a_layernorm", "attn_q_a_norm")
        matrices = {"query_latent": ("q_a_proj", "attn_q_a"), "query": ("q_b_proj", "attn_q_b")}
    for name, (file, gguf) in norms.items():
        names[f"blocks.{name}"] = block_tensor(f"self_attn.{file}", gguf)
    for name, (file, gguf) in matrices.items():
        names[f"blocks.{name}"] = block_tensor(f"self_attn.{file}", gguf, in_axes=1)
    return names
