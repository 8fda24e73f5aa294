"""Gemma 4's text models: attention that differs by window, inputs of each block, experts beside an
MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import json_fields
from decant.models.families.common_tensors import (
    block_tensor,
    common_tensors,
    in_stacks,
    post_norm_tensors,
)
from decant.models.families.family import Family
from decant.models.families.field_reader import FieldReader
from decant.models.families.rotary_fields import write_scaling
from decant.models.families.tensor_name import Part, TensorName
from decant.models.families.typed_rotary import read_typed_rotary
from decant.models.families.windows import FULL, SLIDING, period_of, read_windows, write_windows

_ROTATIONS = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
# True of every Gemma 4 model, so config.json does not state it.
_ALWAYS = {
    "post_norms": True,
    "scale_embedding": True,
    "activation": "gelu_tanh",
    "qk_norm": True,
    "value_norm": True,
    "score_multiplier": 1.0,
    "layer_factors": True,
}
_PER_LAYER = "per_layer_config"


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read the config.json of a Gemma 4 text model."""
    if fields.get("rope_parameters") is None:
        fields = {**fields, "rope_parameters": _ROTATIONS}
    reader = FieldReader("config.json", fields)
    reader.require("hidden_activation", "gelu_pytorch_tanh")
    reader.require("hidden_act", "gelu_pytorch_tanh")
    reader.require("attention_bias", False)
    # "vision" lets the tokens of an image see each other.
    reader.require("use_bidirectional_attention", None, "vision", False)
    sizes = json_fields.read_common(reader, head_dim=256, tied=True)
    windows = read_windows(
        reader,
        window=reader.window("sliding_window", 512),
        default_types=[*period_of(6, layers=sizes["num_layers"])[:-1], FULL],
    )
    if windows[-1] is not None:
        raise ValueError(
            f"config.json: layer_types ends with {SLIDING}, but transformers gives the last block "
            f"of a Gemma 4 model {FULL}. Let a block with full attention be the last one."
        )
    values_are_keys = reader.flag("attention_k_eq_v", False)
    others: dict[str, Any] = {
        **sizes,
        **_ALWAYS,
        **read_typed_rotary(reader, theta=1e6, window_theta=1e4),
        **_read_full(reader, windows, heads=values_are_keys),
        **_read_layer_input(reader, sizes),
        **_read_experts(reader, sizes),
    }
    config = ModelConfig(
        **others,
        windows=windows,
        full_keys_are_values=values_are_keys,
        reading_layers=read_reading_layers(reader, sizes["num_layers"]),
        reading_mlp_factor=2 if reader.flag("use_double_wide_mlp", False) else 1,
        final_softcap=reader.cap("final_logit_softcapping", None),
        family="gemma4",
    )
    reader.finish()
    return config


def read_reading_layers(reader: FieldReader, layers: int, *, default: int = 0) -> int:
    """How many of `layers` blocks read the keys and values of others."""
    name = "num_kv_shared_layers"
    value = reader.take(name, default)
    if type(value) is not int or not 0 <= value < layers:
        raise reader.error(name, value, f"expected a whole number below {layers}, all blocks")
    return value


def _read_full(
    reader: FieldReader, windows: tuple[int | None, ...], *, heads: bool
) -> dict[str, int]:
    """The heads of blocks without a window: transformers 5 writes them block by block."""
    dim = reader.size("global_head_dim", 512, of="full_head_dim")
    count = reader.size_or_null("num_global_key_value_heads", None, of="full_kv_heads")
    count = count or 0 if heads else 0
    blocks = reader.section(_PER_LAYER)
    if blocks.fields:
        full = [str(i) for i, window in enumerate(windows) if window is None]
        each = [dict(blocks.section(i).fields) for i in full]
        if sorted(blocks.fields) != sorted(full) or any(one != each[0] for one in each):
            raise reader.error(
                _PER_LAYER,
                dict(blocks.fields),
                "expected the same sizes for all blocks without a window, and no others",
            )
        one = blocks.section(full[0])
        dim = one.size("head_dim", reader.take("head_dim", 256), of="full_head_dim")
        count = one.size_or_null("num_key_value_heads", None, of="full_kv_heads") or 0
        one.finish()
    return {"full_head_dim": dim, "full_kv_heads": count}


def _read_layer_input(reader: FieldReader, sizes: Mapping[str, Any]) -> dict[str, int]:
    width = reader.take("hidden_size_per_layer_input", 256) or 0
    if width:
        width = reader.size("hidden_size_per_layer_input", 256, of="layer_input_dim")
        reader.require("vocab_size_per_layer_input", sizes["vocab_size"])
    reader.ignore("vocab_size_per_layer_input")
    return {"layer_input_dim": width}


def _read_experts(reader: FieldReader, sizes: Mapping[str, Any]) -> dict[str, Any]:
    if not reader.flag("enable_moe_block", False):
        reader.ignore("num_experts", "top_k_experts", "moe_intermediate_size")
        return {}
    return {
        "expert_norms": True,
        "normalise_experts": True,
        "num_experts": reader.size("num_experts", of="num_experts"),
        "experts_per_token": reader.size("top_k_experts", of="experts_per_token"),
        "intermediate_size": reader.size("moe_intermediate_size", of="intermediate_size"),
        "shared_intermediate_size": sizes["intermediate_size"],
    }


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write the config.json of a Gemma 4 text model."""
    c = config
    fields = json_fields.write_common(c, model_type="gemma4_text", architecture="Gemma4ForCausalLM")
    for name in ("rope_theta", "rope_scaling", "hidden_act"):
        del fields[name]
    local = c.rope_theta if c.window_rope_theta is None else c.window_rope_theta
    full = write_scaling(c.rope_scaling) or {"rope_type": "default"}
    routed = c.num_experts > 0
    return (
        fields
        | write_windows(c)
        | {
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "intermediate_size": c.shared_intermediate_size if routed else c.intermediate_size,
            "rope_parameters": {
                FULL: full | {"rope_theta": c.rope_theta},
                SLIDING: {"rope_type": "default", "rope_theta": local},
            },
            "global_head_dim": c.full_head_dim or c.head_dim,
            "num_global_key_value_heads": c.full_kv_heads or None,
            "attention_k_eq_v": c.full_keys_are_values,
            "num_kv_shared_layers": c.reading_layers,
            "use_double_wide_mlp": c.reading_mlp_factor == 2,
            "hidden_size_per_layer_input": c.layer_input_dim,
            "vocab_size_per_layer_input": c.vocab_size,
            "enable_moe_block": routed,
            "num_experts": c.num_experts or None,
            "top_k_experts": c.experts_per_token or None,
            "moe_intermediate_size": c.intermediate_size if routed else None,
            "final_logit_softcapping": c.final_softcap,
        }
    )


def tensors(config: ModelConfig) -> dict[str, TensorName]:
    """The parameters of each kind of block, and those of the inputs of all blocks."""
    return tensors_by_kind(config, _of_kind)


def tensors_by_kind(
    config: ModelConfig, of_kind: Callable[[ModelConfig], dict[str, TensorName]]
) -> dict[str, TensorName]:
    """The parameters `of_kind` of block, for each, and those of the inputs of all blocks."""
    names = in_stacks(
        {name: of_kind(stack.config) for name, stack in config.stacks.items()}, config
    )
    if config.layer_input_dim:
        # The tables of all blocks are columns of one tensor.
        names["layer_embedding"] = TensorName(
            "model.embed_tokens_per_layer.weight", "", 1, input_first=True
        )
        names["layer_projection"] = TensorName("model.per_layer_model_projection.weight", "", 1)
        names["layer_input_norm"] = TensorName("model.per_layer_projection_norm.weight", "")
    return names


def _of_kind(config: ModelConfig) -> dict[str, TensorName]:
    names = tensors_of_kind(config)
    if config.full_keys_are_values:
        names.pop("blocks.value", None)
    names["blocks.layer_factor_bias"] = TensorName("model.layers.{layer}.layer_scalar", "")
    return names | (_experts(config) if config.num_experts else {})


def tensors_of_kind(config: ModelConfig) -> dict[str, TensorName]:
    """Parameters of blocks that are alike, which may read keys and values and have own inputs."""
    names = common_tensors(config)
    names["blocks.mlp_norm"] = block_tensor("pre_feedforward_layernorm")
    names |= post_norm_tensors("post_attention_layernorm", "post_feedforward_layernorm")
    if config.reading_layers:
        for name in ("key", "value", "key_norm"):
            del names[f"blocks.{name}"]
    if config.layer_input_dim:
        names["blocks.input_gate"] = block_tensor("per_layer_input_gate", in_axes=1)
        names["blocks.input_output"] = block_tensor("per_layer_projection", in_axes=1)
        names["blocks.input_post_norm"] = block_tensor("post_per_layer_input_norm")
    return names


def _experts(config: ModelConfig) -> dict[str, TensorName]:
    width, module = config.intermediate_size, "model.layers.{layer}.experts"
    names = {
        f"blocks.shared_{name}": block_tensor(f"mlp.{name}_proj", in_axes=1)
        for name in ("gate", "up", "down")
    }
    for name, file, part in (
        ("gate", "gate_up_proj", Part(0, width, 2 * width)),
        ("up", "gate_up_proj", Part(width, 2 * width, 2 * width)),
        ("down", "down_proj", None),
    ):
        names[f"blocks.{name}"] = TensorName(
            f"{module}.{file}", "", in_axes=1, experts=True, part=part
        )
    return names | {
        "blocks.router": block_tensor("router.proj", in_axes=1),
        "blocks.router_norm": block_tensor("router", kind="scale"),
        "blocks.expert_factor_bias": block_tensor("router", kind="per_expert_scale"),
        "blocks.shared_post_norm": block_tensor("post_feedforward_layernorm_1"),
        "blocks.expert_norm": block_tensor("pre_feedforward_layernorm_2"),
        "blocks.expert_post_norm": block_tensor("post_feedforward_layernorm_2"),
    }


GEMMA4 = Family(
    name="gemma4",
    model_types=("gemma4_text",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=tensors,
    # Files may hold keys and values of blocks that read those of others.
    redundant=(
        *Family.redundant,
        r"model\.layers\.\d+\.self_attn\.(k_proj|v_proj|k_norm)\.weight",
    ),
)
