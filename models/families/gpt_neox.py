"""GPT-NeoX and Pythia: attention and MLP side by side, LayerNorm, partly rotated heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import gguf_fields, json_fields
from decant.models.families.activations import read_gelu
from decant.models.families.family import Family, GgufFormat
from decant.models.families.field_reader import FieldReader
from decant.models.families.fused import fuse_qkv
from decant.models.families.module_tensors import module_tensors
from decant.models.families.rotary_fields import write_scaling
from decant.models.families.tensor_name import Naming, TensorName

_PART = 0.25
"""How much of a head is turned if the file does not say it."""


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read GPT-NeoX's config.json."""
    turned = fields.get("rotary_pct")
    reader = FieldReader(
        "config.json", {"partial_rotary_factor": _PART if turned is None else turned, **fields}
    )
    reader.ignore("rotary_pct")
    reader.require("num_key_value_heads", None)
    sizes = json_fields.read_common(reader)
    theta = float(reader.number("rotary_emb_base", 10_000.0))
    attention = reader.flag("attention_bias", True)
    config = ModelConfig(
        **(sizes | {"norm_eps": float(reader.number("layer_norm_eps", 1e-5))}),
        **json_fields.read_rotary(reader, theta=theta, head_dim=sizes["head_dim"]),
        activation=read_gelu(reader, "hidden_act", "gelu"),
        norm="layer",
        gated_mlp=False,
        parallel_blocks=reader.flag("use_parallel_residual", True),
        qkv_bias=attention,
        output_bias=attention,
        mlp_bias=True,
        family="gpt_neox",
    )
    reader.finish()
    return config


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write GPT-NeoX's config.json."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": "gelu" if config.activation == "gelu" else "gelu_new",
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": config.turned / config.head_dim,
        "rope_scaling": write_scaling(config.rope_scaling),
        "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "use_parallel_residual": config.parallel_blocks,
        "attention_bias": config.output_bias,
    }


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Read GPT-NeoX's GGUF metadata.

    They lack the activation and usually the rotary base: the published models' are GELU, where
    llama.cpp takes the approximation, and 10,000.
    """
    reader = gguf_fields.architecture_fields(metadata)
    sizes = gguf_fields.read_common(
        reader, metadata, tensors, eps="attention.layer_norm_epsilon", partly=True
    )
    config = ModelConfig(
        **sizes,
        activation="gelu",
        norm="layer",
        gated_mlp=False,
        parallel_blocks=reader.flag("use_parallel_residual", True),
        qkv_bias="blk.0.attn_qkv.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias=True,
        family="gpt_neox",
    )
    reader.finish()
    return config


def tensors(config: ModelConfig) -> dict[str, TensorName]:
    """GPT-NeoX's parameters; one tensor has each head's query, key and value in turn."""
    return _tensors(config, by_head=True)


def tensors_in(
    config: ModelConfig, naming: Naming, present: Collection[str]
) -> dict[str, TensorName]:
    """The same; that tensor of a GGUF file has all queries, then all keys, then all values."""
    return _tensors(config, by_head=naming == "hf")


def _tensors(config: ModelConfig, *, by_head: bool) -> dict[str, TensorName]:
    block, gguf = "gpt_neox.layers.{layer}", "blk.{layer}"
    fused = (f"{block}.attention.query_key_value", f"{gguf}.attn_qkv")
    modules = {
        "embedding": ("gpt_neox.embed_in", "token_embd"),
        "blocks.attention_norm": (f"{block}.input_layernorm", f"{gguf}.attn_norm"),
        "blocks.query": fused,
        "blocks.key": fused,
        "blocks.value": fused,
        "blocks.output": (f"{block}.attention.dense", f"{gguf}.attn_output"),
        "blocks.mlp_norm": (f"{block}.post_attention_layernorm", f"{gguf}.ffn_norm"),
        "blocks.up": (f"{block}.mlp.dense_h_to_4h", f"{gguf}.ffn_up"),
        "blocks.down": (f"{block}.mlp.dense_4h_to_h", f"{gguf}.ffn_down"),
        "final_norm": ("gpt_neox.final_layer_norm", "output_norm"),
    }
    names = module_tensors(config, modules)
    hf, in_gguf = (f"{name}.{{kind}}" for name in fused)
    names |= fuse_qkv(names, config, hf=hf, gguf=in_gguf, by_head=by_head)
    if not config.tie_embeddings:
        names["head"] = TensorName("embed_out.weight", "output.weight", 1)
    return names


GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=tensors,
    tensors_in=tensors_in,
    gguf=GgufFormat("gptneox", config_from_gguf),
    redundant=(r".*\.attention\.(masked_)?bias", r".*\.rotary_emb\.inv_freq"),
)
