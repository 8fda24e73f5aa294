"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama with fused tensors and a window in every block."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import gguf_fields, json_fields
from decant.models.families.common_tensors import common_tensors
from decant.models.families.family import Family, GgufFormat
from decant.models.families.field_reader import FieldReader
from decant.models.families.fused import fuse_gate_and_up, fuse_qkv
from decant.models.families.tensor_name import TensorName
from decant.models.rotary import LongRopeScaling

_ORIGINAL = "original_max_position_embeddings"


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read Phi-3's config.json."""
    reader = FieldReader("config.json", {_ORIGINAL: 4096, **fields})
    reader.require("hidden_act", "silu")
    reader.require("full_attn_mod", 1)
    sizes = json_fields.read_common(reader, eps=1e-5)
    config = ModelConfig(
        **sizes,
        **json_fields.read_rotary(reader, head_dim=sizes["head_dim"]),
        windows=(reader.window("sliding_window", None),),
        family="phi3",
    )
    reader.finish()
    return config


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write Phi-3's config.json."""
    fields = json_fields.write_common(config, model_type="phi3", architecture="Phi3ForCausalLM")
    scaling, original = config.rope_scaling, config.max_positions
    if isinstance(scaling, LongRopeScaling):
        original = scaling.original_max_positions
    # Transformers' default pad token is 32,000, which a small vocabulary lacks.
    return fields | {
        "sliding_window": config.windows[0],
        _ORIGINAL: original,
        "pad_token_id": None,
    }


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Read Phi-3's GGUF metadata. A window of 0 positions stands for none."""
    reader = gguf_fields.architecture_fields(metadata)
    original = reader.size("rope.scaling.original_context_length", of="max_positions")
    by_length = reader.take("rope.scaling.type", "") == "longrope"
    if by_length:
        reader = FieldReader(reader.where, {**reader.fields, "rope.scaling.type": "none"})
        reader.ignore("rope.scaling.original_context_length")
    fields = gguf_fields.read_common(reader, metadata, tensors, partly=True)
    if by_length or "rope_factors_long" in metadata:
        fields["rope_scaling"] = _long_rope(reader, metadata, original)
    window = reader.take("attention.sliding_window")
    window = None if window == 0 else reader.window("attention.sliding_window", None)
    reader.finish()
    return ModelConfig(**fields, windows=(window,), family="phi3")


def _long_rope(reader: FieldReader, metadata: Mapping[str, Any], original: int) -> LongRopeScaling:
    names = ("rope_factors_short", "rope_factors_long")
    missing = [f"{name}.weight" for name in names if name not in metadata]
    if missing:
        raise ValueError(
            f"GGUF tensor {missing[0]} is missing, whose values divide the rotary frequencies. "
            "Convert the model anew, or use its Hugging Face directory."
        )
    short, long = (tuple(float(x) for x in metadata[name].ravel()) for name in names)
    return LongRopeScaling(short, long, original, float(reader.number("rope.scaling.attn_factor")))


def tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Llama's parameters, of which five lie in two tensors."""
    names, block, gguf = common_tensors(config), "model.layers.{layer}", "blk.{layer}"
    return (
        names
        | fuse_qkv(
            names,
            config,
            hf=f"{block}.self_attn.qkv_proj.{{kind}}",
            gguf=f"{gguf}.attn_qkv.{{kind}}",
            by_head=False,
        )
        | fuse_gate_and_up(
            names,
            config,
            hf=f"{block}.mlp.gate_up_proj.{{kind}}",
            gguf=f"{gguf}.ffn_up.{{kind}}",
        )
    )


PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=tensors,
    gguf=GgufFormat("phi3", config_from_gguf),
    redundant=(*Family.redundant, r"rope_factors_(long|short)\.weight"),
)
