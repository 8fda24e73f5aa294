"""GPT-2: learned positions, LayerNorm, and an MLP that is not gated."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import gguf_fields
from decant.models.families.activations import read_gelu
from decant.models.families.family import Family, GgufFormat
from decant.models.families.field_reader import FieldReader
from decant.models.families.fused import fuse_qkv
from decant.models.families.module_tensors import module_tensors
from decant.models.families.tensor_name import TensorName

_ALWAYS: dict[str, Any] = {
    "learned_positions": True,
    "rotary_layers": (False,),
    "norm": "layer",
    "gated_mlp": False,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "family": "gpt2",
}


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read GPT-2's config.json."""
    reader = FieldReader("config.json", fields)
    reader.ignore("quantization_config", "compression_config")  # as in read_common
    reader.require("scale_attn_weights", True)
    reader.require("scale_attn_by_inverse_layer_idx", False)
    for name in ("rope_interleaved", "use_mrope"):
        reader.require(name, False)
    reader.require("is_causal", True)
    reader.ignore(*(name for name in fields if name.startswith("summary_")))
    reader.ignore("n_ctx", "reorder_and_upcast_attn")
    width, heads = reader.size("n_embd", of="hidden_size"), reader.size("n_head", of="num_heads")
    if width % heads:
        raise reader.error("n_head", heads, f"n_embd {width} is no multiple of it")
    config = ModelConfig(
        vocab_size=reader.size("vocab_size", of="vocab_size"),
        hidden_size=width,
        intermediate_size=reader.size("n_inner", 4 * width, of="intermediate_size"),
        num_layers=reader.size("n_layer", of="num_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        norm_eps=float(reader.number("layer_norm_epsilon", 1e-5)),
        max_positions=reader.size("n_positions", 1024, of="max_positions"),
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        activation=read_gelu(reader, "activation_function", "gelu_new"),
        **_ALWAYS,
    )
    reader.finish()
    return config


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write GPT-2's config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu" if config.activation == "gelu" else "gelu_new",
        "tie_word_embeddings": config.tie_embeddings,
    }


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Read GPT-2's GGUF metadata."""
    reader = gguf_fields.architecture_fields(metadata)
    sizes = gguf_fields.read_common(reader, metadata, tensors, eps="attention.layer_norm_epsilon")
    reader.finish()
    return ModelConfig(**sizes, activation="gelu_tanh", **_ALWAYS)


def tensors(config: ModelConfig) -> dict[str, TensorName]:
    """GPT-2's parameters; all linear maps but the head are stored as [input, output]."""
    block, gguf = "transformer.h.{layer}", "blk.{layer}"
    modules = {
        "embedding": ("transformer.wte", "token_embd"),
        "positions": ("transformer.wpe", "position_embd"),
        "blocks.attention_norm": (f"{block}.ln_1", f"{gguf}.attn_norm"),
        "blocks.query": (f"{block}.attn.c_attn", f"{gguf}.attn_qkv"),
        "blocks.key": (f"{block}.attn.c_attn", f"{gguf}.attn_qkv"),
        "blocks.value": (f"{block}.attn.c_attn", f"{gguf}.attn_qkv"),
        "blocks.output": (f"{block}.attn.c_proj", f"{gguf}.attn_output"),
        "blocks.mlp_norm": (f"{block}.ln_2", f"{gguf}.ffn_norm"),
        "blocks.up": (f"{block}.mlp.c_fc", f"{gguf}.ffn_up"),
        "blocks.down": (f"{block}.mlp.c_proj", f"{gguf}.ffn_down"),
        "final_norm": ("transformer.ln_f", "output_norm"),
    }
    names = module_tensors(config, modules, input_first=True)
    names |= fuse_qkv(
        names,
        config,
        hf=f"{block}.attn.c_attn.{{kind}}",
        gguf=f"{gguf}.attn_qkv.{{kind}}",
        by_head=False,
    )
    if not config.tie_embeddings:
        names["head"] = TensorName("lm_head.weight", "output.weight", 1)
    return names


GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=tensors,
    gguf=GgufFormat("gpt2", config_from_gguf),
    redundant=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
    optional_prefix="transformer.",
)
