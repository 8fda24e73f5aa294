"""Qwen3-Next and Qwen3.5: three blocks of linear attention, then one of gated full attention."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import json_fields
from decant.models.families.common_tensors import (
    block_tensor,
    common_tensors,
    expert_tensors,
    in_stacks,
)
from decant.models.families.family import Family
from decant.models.families.field_reader import FieldReader, shown
from decant.models.families.tensor_name import Naming, Part, TensorName
from decant.models.families.towers import without_grid

_FULL, _LINEAR = "full_attention", "linear_attention"
_PERIOD, _PART = 4, 0.25
_SIZES = {
    "linear_key_heads": ("linear_num_key_heads", 16),
    "linear_value_heads": ("linear_num_value_heads", 32),
    "linear_key_dim": ("linear_key_head_dim", 128),
    "linear_value_dim": ("linear_value_head_dim", 128),
    "convolution": ("linear_conv_kernel_dim", 4),
}
"""Fields of ModelConfig → fields of config.json and their defaults."""
_MATRICES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def config_from_json(
    fields: Mapping[str, Any],
    *,
    family: str,
    experts: Mapping[str, int] | None = None,
    normalise: bool = True,
) -> ModelConfig:
    """Read a config.json.

    Args:
        fields: of the file.
        family: the family's name.
        experts: defaults of their fields. None: the family has one MLP a block.
        normalise: the weights of the chosen experts may be left as they are.
    """
    fields = {"partial_rotary_factor": _PART, **fields}
    if experts:
        fields = {**experts, **fields}
        fields["intermediate_size"] = fields["moe_intermediate_size"]
    for name in ("rope_scaling", "rope_parameters"):
        fields[name] = without_grid(fields.get(name), fields)
    reader = FieldReader("config.json", fields)
    reader.require("hidden_act", "silu")
    reader.require("attention_bias", False)
    reader.require("attn_output_gate", True)
    reader.require("decoder_sparse_step", 1)
    reader.require("mlp_only_layers", [])
    # Of layers that guess further tokens, and how other programs keep states.
    reader.ignore("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype")
    sizes = json_fields.read_common(reader, head_dim=256)
    linear = {ours: reader.size(name, default, of=ours) for ours, (name, default) in _SIZES.items()}
    config = ModelConfig(
        **sizes,
        **json_fields.read_rotary(reader, head_dim=sizes["head_dim"]),
        **linear,
        **(_read_experts(reader, normalise=normalise) if experts else {}),
        linear_layers=_read_kinds(reader),
        norm_adds_one=True,
        qk_norm=True,
        attention_gate=True,
        family=family,
    )
    reader.finish()
    return config


def _read_kinds(reader: FieldReader) -> tuple[bool, ...]:
    """Whether each block has linear attention."""
    count = reader.size("num_hidden_layers", of="num_layers")
    period = reader.size("full_attention_interval", _PERIOD, of="num_layers")
    usual = [_LINEAR if (i + 1) % period else _FULL for i in range(count)]
    kinds = reader.take("layer_types", usual)
    if not isinstance(kinds, list) or len(kinds) != count or {*map(str, kinds)} - {_FULL, _LINEAR}:
        raise ValueError(
            f"{reader.where}: layer_types is {shown(kinds)}; expected {_LINEAR} or {_FULL} for "
            f"each of num_hidden_layers = {count} blocks."
        )
    return tuple(kind == _LINEAR for kind in kinds)


def _read_experts(reader: FieldReader, *, normalise: bool) -> dict[str, Any]:
    if not normalise:
        reader.require("norm_topk_prob", True)
    reader.ignore("moe_intermediate_size")  # read as intermediate_size
    return {
        "num_experts": reader.size("num_experts", of="num_experts"),
        "experts_per_token": reader.size("num_experts_per_tok", of="experts_per_token"),
        "normalise_experts": reader.flag("norm_topk_prob", True),
        "shared_intermediate_size": reader.size(
            "shared_expert_intermediate_size", of="intermediate_size"
        ),
        "shared_expert_gate": True,
    }


def config_to_json(config: ModelConfig, *, model_type: str, architecture: str) -> dict[str, Any]:
    """Write a config.json."""
    fields = json_fields.write_common(config, model_type=model_type, architecture=architecture)
    kinds = [_LINEAR if linear else _FULL for linear in config.layers_linear]
    fields = {"partial_rotary_factor": 1.0} | fields | {"layer_types": kinds}
    fields |= {"attention_bias": False}
    if any(config.layers_linear):
        fields |= {name: getattr(config, ours) for ours, (name, _) in _SIZES.items()}
    if config.num_experts:
        fields |= {
            "moe_intermediate_size": config.intermediate_size,
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            "norm_topk_prob": config.normalise_experts,
            "shared_expert_intermediate_size": config.shared_intermediate_size,
        }
    return fields


def tensors(config: ModelConfig, *, fused: bool) -> dict[str, TensorName]:
    """The parameters of both kinds of blocks.

    `fused`: one tensor has all that linear attention makes of a state, one group of heads after the
    other; another has each head's rates and decays.
    """
    each = {}
    for name, stack in config.stacks.items():
        c = stack.config
        names = common_tensors(c) | (_routed_tensors() if c.num_experts else {})
        if c.linear_layers[0]:
            for absent in ("query", "key", "value", "output", "query_norm", "key_norm"):
                names.pop(f"blocks.{absent}", None)
            names |= _linear_tensors(c, fused=fused)
        else:
            width = c.head_dim
            for path, first in (("query", 0), ("output_gate", width)):
                part = Part(first, first + width, 2 * width, c.num_heads)
                names[f"blocks.{path}"] = block_tensor("self_attn.q_proj", in_axes=1, part=part)
        each[name] = names
    return in_stacks(each, config)


def _routed_tensors() -> dict[str, TensorName]:
    names = expert_tensors("mlp", _MATRICES)
    for name, file in _MATRICES.items():
        names[f"blocks.shared_{name}"] = block_tensor(f"mlp.shared_expert.{file}", in_axes=1)
    names["blocks.shared_expert_gate"] = block_tensor("mlp.shared_expert_gate", in_axes=1)
    return names


def _linear_tensors(c: ModelConfig, *, fused: bool) -> dict[str, TensorName]:
    groups, shared = c.linear_key_heads, c.linear_value_heads // c.linear_key_heads
    keys, values = c.linear_key_dim, shared * c.linear_value_dim
    # Of one group of heads.
    outputs = {"linear_query": keys, "linear_key": keys, "linear_value": values}
    convolved = _consecutive({name: groups * size for name, size in outputs.items()}, runs=1)
    names: dict[str, tuple[str, Part | None]] = {}
    if fused:
        of_group = _consecutive(outputs | {"linear_gate": values}, runs=groups)
        of_heads = _consecutive({"linear_rate": shared, "linear_decay": shared}, runs=groups)
        names |= {name: ("in_proj_qkvz", part) for name, part in of_group.items()}
        names |= {name: ("in_proj_ba", part) for name, part in of_heads.items()}
    else:
        names |= {name: ("in_proj_qkv", part) for name, part in convolved.items()}
        apart = {"linear_gate": "z", "linear_rate": "b", "linear_decay": "a"}
        names |= {name: (f"in_proj_{letter}", None) for name, letter in apart.items()}
    linear = {
        name: block_tensor(f"linear_attn.{file}", in_axes=1, part=part)
        for name, (file, part) in names.items()
    }
    for name, part in convolved.items():
        linear[f"{name.removeprefix('linear_')}_taps"] = TensorName(
            "model.layers.{layer}.linear_attn.conv1d.weight", "", 1, part=part, by_channel=True
        )
    for name, file in (("linear_decay_bias", "dt_bias"), ("log_decay_bias", "A_log")):
        linear[name] = TensorName(f"model.layers.{{layer}}.linear_attn.{file}", "", 0)
    linear["linear_norm"] = block_tensor("linear_attn.norm")
    linear["linear_output"] = block_tensor("linear_attn.out_proj", in_axes=3)
    return {f"blocks.{name}": tensor for name, tensor in linear.items()}


def _consecutive(sizes: Mapping[str, int], *, runs: int) -> dict[str, Part]:
    """Parts of these sizes, of each run one after the other."""
    parts, whole, start = {}, sum(sizes.values()), 0
    for name, size in sizes.items():
        parts[name] = Part(start, start + size, whole, runs)
        start += size
    return parts


def tensors_in(
    config: ModelConfig, naming: Naming, present: Collection[str], *, fused: bool
) -> dict[str, TensorName]:
    """As `tensors`, of files that may have one tensor a block for the gates and ups of all experts,
    and one for their downs, as Qwen3.5's files do."""
    names = tensors(config, fused=fused)
    path = "model.layers.{layer}.mlp.experts."
    if f"{path}down_proj".format(layer=0) not in present:
        return names
    width = config.intermediate_size
    stacked = {
        "gate": ("gate_up_proj", Part(0, width, 2 * width)),
        "up": ("gate_up_proj", Part(width, 2 * width, 2 * width)),
        "down": ("down_proj", None),
    }
    experts = {
        f"blocks.{name}": TensorName(path + file, "", in_axes=1, experts=True, part=part)
        for name, (file, part) in stacked.items()
    }
    return names | in_stacks(dict.fromkeys(config.stacks, experts), config)


_NEXT_EXPERTS = {
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 10,
    "num_experts": 512,
}
_EXPERTS = _NEXT_EXPERTS | {"num_experts_per_tok": 8, "num_experts": 256}
_GUESSING = (*Family.redundant, r"mtp\..*")
"""Tensors left out: beside the usual ones, those of layers that guess further tokens."""

QWEN3_NEXT = Family(
    name="qwen3_next",
    model_types=("qwen3_next",),
    config_from_json=partial(config_from_json, family="qwen3_next", experts=_NEXT_EXPERTS),
    config_to_json=partial(
        config_to_json, model_type="qwen3_next", architecture="Qwen3NextForCausalLM"
    ),
    tensors=partial(tensors, fused=True),
    tensors_in=partial(tensors_in, fused=True),
    redundant=_GUESSING,
)
QWEN3_5 = Family(
    name="qwen3_5",
    model_types=("qwen3_5_text",),
    config_from_json=partial(config_from_json, family="qwen3_5"),
    config_to_json=partial(
        config_to_json, model_type="qwen3_5_text", architecture="Qwen3_5ForCausalLM"
    ),
    tensors=partial(tensors, fused=False),
    redundant=_GUESSING,
)
QWEN3_5_MOE = Family(
    name="qwen3_5_moe",
    model_types=("qwen3_5_moe_text",),
    config_from_json=partial(
        config_from_json, family="qwen3_5_moe", experts=_EXPERTS, normalise=False
    ),
    config_to_json=partial(
        config_to_json, model_type="qwen3_5_moe_text", architecture="Qwen3_5MoeForCausalLM"
    ),
    tensors=partial(tensors, fused=False),
    tensors_in=partial(tensors_in, fused=False),
    redundant=_GUESSING,
)
