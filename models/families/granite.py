"""Granite 3 and 4 without experts or Mamba: Llama with four multipliers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import gguf_fields, json_fields
from decant.models.families.common_tensors import block_tensor, common_tensors
from decant.models.families.family import Family, GgufFormat
from decant.models.families.field_reader import FieldReader
from decant.models.families.fused import fuse_gate_and_up
from decant.models.families.tensor_name import TensorName

_ATTENTION = ("attention", "full_attention")


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read Granite 3's config.json."""
    reader = FieldReader("config.json", fields)
    reader.require("hidden_act", "silu")
    config = ModelConfig(
        **json_fields.read_common(reader),
        **json_fields.read_biases(reader),
        **json_fields.read_rotary(reader),
        **_read_multipliers(reader),
        family="granite",
    )
    reader.finish()
    return config


def _read_multipliers(reader: FieldReader) -> dict[str, Any]:
    return {
        "embedding_multiplier": float(reader.number("embedding_multiplier", 1.0)),
        "residual_multiplier": float(reader.number("residual_multiplier", 1.0)),
        "score_multiplier": float(reader.number("attention_multiplier", 1.0)),
        "logit_divisor": float(reader.number("logits_scaling", 1.0)),
    }


def _write_multipliers(config: ModelConfig) -> dict[str, Any]:
    score = config.score_multiplier
    return {
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "attention_multiplier": config.head_dim**-0.5 if score is None else score,
        "logits_scaling": config.logit_divisor,
    }


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write Granite 3's config.json."""
    fields = json_fields.write_common(
        config, model_type="granite", architecture="GraniteForCausalLM"
    )
    return fields | json_fields.write_biases(config) | _write_multipliers(config)


def hybrid_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read Granite 4's config.json, of a model whose blocks all have attention and one MLP."""
    reader = FieldReader("config.json", fields)
    reader.require("hidden_act", "silu")
    sizes = json_fields.read_common(reader)
    sizes["intermediate_size"] = reader.size(
        "shared_intermediate_size", 1024, of="intermediate_size"
    )
    mamba = ["mamba"] * sizes["num_layers"]
    types = reader.take("layer_types", reader.take("layers_block_type", mamba))
    if not isinstance(types, list) or any(kind not in _ATTENTION for kind in types):
        raise reader.error("layer_types", types, "only blocks of attention can be run, no Mamba")
    if reader.take("num_local_experts", 8):
        raise reader.error(
            "num_local_experts", fields.get("num_local_experts"), "only 0 can be run: no experts"
        )
    reader.ignore("num_experts_per_tok", *(name for name in fields if name.startswith("mamba_")))
    reader.ignore("time_step_limit", "init_method")
    reader.require("normalization_function", "rmsnorm")
    positions = reader.take("position_embedding_type", "nope")
    if positions not in ("rope", "nope"):
        raise reader.error("position_embedding_type", positions, "expected rope or nope")
    config = ModelConfig(
        **sizes,
        **json_fields.read_biases(reader, mlp=False),
        **json_fields.read_rotary(reader),
        **_read_multipliers(reader),
        rotary_layers=(positions == "rope",),
        family="granite_hybrid",
    )
    reader.finish()
    return config


def hybrid_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write Granite 4's config.json."""
    fields = json_fields.write_common(
        config, model_type="granitemoehybrid", architecture="GraniteMoeHybridForCausalLM"
    )
    fields |= json_fields.write_biases(config, mlp=False) | _write_multipliers(config)
    return fields | {
        "shared_intermediate_size": config.intermediate_size,
        "layer_types": ["attention"] * config.num_layers,
        "position_embedding_type": "rope" if config.rotary_layers[0] else None,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        # No block uses it, but transformers asks that it divides the width.
        "mamba_n_heads": 1,
    }


def hybrid_tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Llama's parameters; gate and up lie in one tensor."""
    names = common_tensors(config)
    names |= fuse_gate_and_up(
        names, config, hf="model.layers.{layer}.shared_mlp.input_linear.{kind}"
    )
    return names | {"blocks.down": block_tensor("shared_mlp.output_linear", in_axes=1)}


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Read Granite's GGUF metadata; dense Granite 4 is written as Granite 3."""
    reader = gguf_fields.architecture_fields(metadata)
    config = ModelConfig(
        **gguf_fields.read_common(reader, metadata, tensors),
        **gguf_fields.read_biases(tensors),
        embedding_multiplier=float(reader.number("embedding_scale", 1.0)),
        residual_multiplier=float(reader.number("residual_scale", 1.0)),
        score_multiplier=float(reader.number("attention.scale")),
        logit_divisor=float(reader.number("logit_scale", 1.0)),
        family="granite",
    )
    reader.finish()
    return config


GRANITE = Family(
    name="granite",
    model_types=("granite",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=common_tensors,
    gguf=GgufFormat("granite", config_from_gguf, interleaves_rotary=True),
)
GRANITE_HYBRID = Family(
    name="granite_hybrid",
    model_types=("granitemoehybrid",),
    config_from_json=hybrid_from_json,
    config_to_json=hybrid_to_json,
    tensors=hybrid_tensors,
)
