"""Gemma 3n's text models: Gemma 4's blocks with several copies of the residual stream, a branch of
low rank beside attention, and sparse gates in some MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import json_fields
from decant.models.families.common_tensors import block_tensor
from decant.models.families.family import Family
from decant.models.families.field_reader import FieldReader
from decant.models.families.gemma4 import (
    GEMMA4,
    read_reading_layers,
    tensors_by_kind,
    tensors_of_kind,
)
from decant.models.families.tensor_name import TensorName
from decant.models.families.typed_rotary import read_typed_rotary
from decant.models.families.windows import period_of, read_windows, write_windows

# True of every Gemma 3n model, so config.json does not state it.
_ALWAYS = {
    "post_norms": True,
    "scale_embedding": True,
    "activation": "gelu_tanh",
    "qk_norm": True,
    "value_norm": True,
    "score_multiplier": 1.0,
}
_WIDTHS, _SPARSITY = "intermediate_size", "activation_sparsity_pattern"


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read the config.json of a Gemma 3n text model."""
    reader = FieldReader("config.json", _with_one_width(fields))
    reader.require("hidden_activation", "gelu_pytorch_tanh")
    reader.require("hidden_act", "gelu_pytorch_tanh")
    reader.require("attention_bias", False)
    reader.require("altup_active_idx", 0)
    reader.require("altup_correct_scale", True)
    # Only training in transformers clips coefficients. Scores are never divided.
    reader.ignore("altup_coef_clip", "altup_lr_multiplier", "query_pre_attn_scalar")
    copies = reader.size("altup_num_inputs", 4, of="stream_copies")
    if copies < 2:
        raise reader.error("altup_num_inputs", copies, "expected at least 2 copies")
    sizes = json_fields.read_common(reader, head_dim=256, tied=True)
    config = ModelConfig(
        **sizes,
        **_ALWAYS,
        **read_typed_rotary(
            reader, theta=1e6, window_theta=reader.number("rope_local_base_freq", 1e4)
        ),
        windows=read_windows(
            reader,
            window=reader.window("sliding_window", 512),
            default_types=period_of(5, layers=sizes["num_layers"]),
        ),
        reading_layers=read_reading_layers(reader, sizes["num_layers"], default=15),
        layer_input_dim=reader.size("hidden_size_per_layer_input", 256, of="layer_input_dim"),
        layer_input_rows=reader.size("vocab_size_per_layer_input", 262144, of="layer_input_rows"),
        stream_copies=copies,
        laurel_rank=reader.size("laurel_rank", 64, of="laurel_rank"),
        gate_sparsity=_read_sparsity(reader, sizes["num_layers"]),
        final_softcap=float(reader.number("final_logit_softcapping", 30.0)),
        family="gemma3n",
    )
    reader.finish()
    return config


def _with_one_width(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields with one width of the MLP, which files give for each block."""
    widths = fields.get(_WIDTHS)
    if not isinstance(widths, list):
        return fields
    if len({*map(str, widths)}) != 1 or len(widths) != fields.get("num_hidden_layers"):
        raise ValueError(
            f"config.json: {_WIDTHS} = {sorted({*map(str, widths)})} for {len(widths)} blocks; "
            "expected one width for all num_hidden_layers blocks. Models with blocks of several "
            "widths cannot be run."
        )
    return {**fields, _WIDTHS: widths[0]}


def _read_sparsity(reader: FieldReader, layers: int) -> tuple[float, ...]:
    sparse = 10 if layers > 10 else 0
    value = reader.take(_SPARSITY, [0.95] * sparse + [0.0] * (layers - sparse))
    shares = value if isinstance(value, list) else []
    if len(shares) != layers or not all(
        type(share) in (int, float) and 0 <= share < 1 for share in shares
    ):
        raise reader.error(
            _SPARSITY, value, f"expected a share from 0 to below 1 for each of {layers} blocks"
        )
    return tuple(float(share) for share in shares)


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write the config.json of a Gemma 3n text model."""
    c = config
    fields = json_fields.write_common(
        c, model_type="gemma3n_text", architecture="Gemma3nForCausalLM"
    )
    windows = write_windows(c)
    return (
        fields
        | windows
        | {
            # Transformers wants a number even if no block has a window.
            "sliding_window": windows["sliding_window"] or 512,
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            _WIDTHS: [c.intermediate_size] * c.num_layers,
            _SPARSITY: list(c.layers_sparsity),
            "rope_local_base_freq": (
                c.rope_theta if c.window_rope_theta is None else c.window_rope_theta
            ),
            "altup_active_idx": 0,
            "altup_correct_scale": True,
            "altup_num_inputs": c.stream_copies,
            "laurel_rank": c.laurel_rank,
            "num_kv_shared_layers": c.reading_layers,
            "hidden_size_per_layer_input": c.layer_input_dim,
            "vocab_size_per_layer_input": c.layer_input_rows or c.vocab_size,
            "final_logit_softcapping": c.final_softcap,
        }
    )


def tensors(config: ModelConfig) -> dict[str, TensorName]:
    """The parameters of each kind of block, those of the inputs of all blocks, and of copies."""
    return tensors_by_kind(config, _of_kind) | {
        "copy_projection": TensorName("model.altup_projections.{layer}.weight", "", 1),
        "copy_return": TensorName("model.altup_unembed_projections.{layer}.weight", "", 1),
    }


def _of_kind(config: ModelConfig) -> dict[str, TensorName]:
    return tensors_of_kind(config) | {
        "blocks.laurel_left": block_tensor("laurel.linear_left", in_axes=1),
        "blocks.laurel_right": block_tensor("laurel.linear_right", in_axes=1),
        "blocks.laurel_norm": block_tensor("laurel.post_laurel_norm"),
        "blocks.copy_router": block_tensor("altup.modality_router", in_axes=1),
        "blocks.copy_router_norm": block_tensor("altup.router_norm"),
        "blocks.prediction": block_tensor("altup.prediction_coefs", in_axes=1),
        "blocks.correction": block_tensor("altup.correction_coefs", in_axes=1),
        "blocks.copy_factor_bias": TensorName(
            "model.layers.{layer}.altup.correct_output_scale", ""
        ),
    }


GEMMA3N = Family(
    name="gemma3n",
    model_types=("gemma3n_text",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=tensors,
    redundant=GEMMA4.redundant,
)
