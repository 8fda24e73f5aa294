"""GGUF files of DeepSeek V2 and V3 and of what is built like them: architecture deepseek2.

Newer files describe one head of keys, the latent vector with the turned coordinates. They hold the
maps from latents to keys and values apart, head by head. Older files have one tensor of both, and
describe every head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import gguf_fields
from decant.models.families.family import GgufFormat
from decant.models.families.field_reader import FieldReader
from decant.models.families.tensor_name import TensorName
from decant.models.rotary import YarnScaling

_SOFTMAX, _SIGMOID = 1, 2
_GROUPED = (160, 256)
"""Experts of published models that lie in groups: DeepSeek V2's and V3's."""
OLDER_MAPS = r"blk\.\d+\.attn_kv_b\.weight"
"""Some files hold keys and values in both forms."""


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Read the metadata of a deepseek2 file: DeepSeek V2 with a softmax, V3 with a sigmoid."""
    reader, fields = _attention(metadata, tensors)
    # The number of layers that guess tokens further ahead, which these files leave out.
    reader.require("nextn_predict_layers", 0)
    if not reader.take("expert_count", 0):
        reader.require("leading_dense_block_count", fields["num_layers"])
        reader.require("expert_shared_count", 0)
        reader.ignore("expert_feed_forward_length")
        reader.finish()
        return ModelConfig(**fields, family="youtu")
    fields |= _experts(reader, fields)
    # Files of DeepSeek V2 that are older than V3 do not say it.
    sigmoid = any(name.endswith("exp_probs_b.bias") for name in tensors)
    kind = reader.take("expert_gating_func", _SIGMOID if sigmoid else _SOFTMAX)
    reader.require("expert_gating_func", _SOFTMAX, _SIGMOID)
    if kind == _SOFTMAX:
        reader.require("expert_weights_norm", False)
        special: dict[str, Any] = {"group_votes": 1, "family": "deepseek_v2"}
    else:
        special = {
            "router": "sigmoid",
            "router_correction": True,
            "normalise_experts": reader.flag("expert_weights_norm", False),
            "family": "deepseek_v3",
        }
    reader.finish()
    return ModelConfig(**fields, **special)


def _attention(
    metadata: Mapping[str, Any], tensors: Collection[str]
) -> tuple[FieldReader, dict[str, Any]]:
    """A reader of the other fields, and ModelConfig arguments: sizes, rotation and attention."""
    stated = gguf_fields.architecture_fields(metadata)
    form = "_mla" if "attention.key_length_mla" in stated.fields else ""
    width = stated.size(f"attention.key_length{form}", of="head_dim")
    value = stated.size(f"attention.value_length{form}", of="value_dim")
    heads = stated.size("attention.head_count", of="num_heads")
    as_usual = {
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.head_count_kv": heads,
    }
    reader = FieldReader(stated.where, {**stated.fields, **as_usual})
    fields = gguf_fields.read_common(reader, metadata, tensors, partly=True)
    reader.ignore("attention.key_length_mla", "attention.value_length_mla")
    queries = (
        reader.size("attention.q_lora_rank", 0, of="query_latent_dim")
        if ("attention.q_lora_rank" in reader.fields)
        else 0
    )
    return reader, fields | _yarn(reader, fields["rope_scaling"]) | {
        "value_dim": value,
        "latent_dim": reader.size("attention.kv_lora_rank", of="latent_dim"),
        "query_latent_dim": queries,
        "rotary_neighbours": True,
    }


def _yarn(reader: FieldReader, scaling: Any) -> dict[str, Any]:
    """YaRN as DeepSeek has it: it scales the scores rather than the turned coordinates."""
    if not isinstance(scaling, YarnScaling):
        reader.ignore("rope.scaling.yarn_log_multiplier")  # llama.cpp multiplies by ln 1
        return {}
    reader.require("rope.scaling.attn_factor", 1.0)
    return {
        "rope_scaling": dataclasses.replace(scaling, attention_factor=1.0),
        # Files hold a tenth of it, as float32.
        "yarn_score_scale": round(reader.number("rope.scaling.yarn_log_multiplier") / 0.1, 6),
    }


def _experts(reader: FieldReader, sizes: Mapping[str, Any]) -> dict[str, Any]:
    width = reader.size("expert_feed_forward_length", of="intermediate_size")
    count = reader.size("expert_count", of="num_experts")
    dense = reader.take("leading_dense_block_count", 0)
    if type(dense) is not int or not 0 <= dense < sizes["num_layers"]:
        raise reader.error("leading_dense_block_count", dense, "expected less than all blocks")
    groups = ... if count in _GROUPED else 1
    return {
        "intermediate_size": width,
        "dense_intermediate_size": sizes["intermediate_size"],
        "num_experts": count,
        "experts_per_token": reader.size("expert_used_count", of="experts_per_token"),
        "expert_groups": reader.size("expert_group_count", groups, of="num_experts"),
        "groups_per_token": reader.size("expert_group_used_count", groups, of="num_experts"),
        "expert_multiplier": float(reader.number("expert_weights_scale", 1.0)),
        "shared_intermediate_size": width * reader.size("expert_shared_count", of="num_experts"),
        "dense_layers": dense,
    }


def with_maps_apart(
    names: Mapping[str, TensorName], present: Collection[str]
) -> dict[str, TensorName]:
    """`names` with the maps from latents by head, if the file holds tensors of keys alone."""
    if not any(".attn_k_b." in name for name in present):
        return dict(names)
    # Our [latent, head, key or value] lies there as [head, latent, key] and [head, value, latent].
    apart = {"key": ("attn_k_b", (1, 0, 2)), "value": ("attn_v_b", (1, 2, 0))}
    found = dict(names)
    for path, name in names.items():
        file, order = apart.get(path.rpartition(".")[2], ("", None))
        if order:
            found[path] = dataclasses.replace(
                name, gguf=f"blk.{{layer}}.{file}.weight", part=None, order=order
            )
    return found


DEEPSEEK_GGUF = GgufFormat("deepseek2", config_from_gguf)
