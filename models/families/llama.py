"""Llama and models that are Llama by another name (SmolLM): files ↔ config."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from models.config import ModelConfig
from models.families.family import Family, FieldReader, TensorName

# Fields of config.json that say how a model was made, stored or sampled from.
BOOKKEEPING = (
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "use_cache",
)


def shared_fields(reader: FieldReader) -> dict[str, Any]:
    """The config.json fields that Llama's relatives spell alike, as ModelConfig arguments."""
    reader.ignore(*BOOKKEEPING)
    reader.require("hidden_act", "silu")
    reader.require("rope_interleaved", False)
    heads, width = reader.take("num_attention_heads"), reader.take("hidden_size")
    return {
        "vocab_size": reader.take("vocab_size"),
        "hidden_size": width,
        "intermediate_size": reader.take("intermediate_size"),
        "num_layers": reader.take("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": reader.take("num_key_value_heads", heads),
        "head_dim": reader.take("head_dim", width // heads),
        "rope_theta": float(_rope_theta(reader)),
        "norm_eps": float(reader.take("rms_norm_eps", 1e-6)),
        "max_positions": reader.take("max_position_embeddings"),
        "tie_embeddings": reader.take("tie_word_embeddings", False),
    }


def _rope_theta(reader: FieldReader) -> float:
    """Transformers 5 writes rope_parameters, earlier ones rope_theta beside rope_scaling."""
    plain = reader.take("rope_theta", None)
    for name in ("rope_scaling", "rope_parameters"):
        rope = FieldReader(f"{reader.where}: {name}", reader.take(name, {}))
        rope.require("rope_type", "default")
        rope.require("type", "default")
        plain = rope.take("rope_theta", plain)
        rope.finish()
    return 10_000.0 if plain is None else plain


def hf_fields(config: ModelConfig, *, model_type: str, architecture: str) -> dict[str, Any]:
    """Inverse of `shared_fields`."""
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
        "hidden_act": "silu",
        # Both transformers 4 and 5 read this spelling.
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
    }


def config_from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Llama's config.json."""
    reader = FieldReader("config.json", fields)
    config = ModelConfig(**shared_fields(reader))
    # Llama's attention_bias also puts a bias on the output projection, which we have not.
    reader.require("attention_bias", False)
    reader.require("mlp_bias", False)
    reader.require("sliding_window", None)
    reader.finish()
    return config


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json for a model without biases."""
    if config.qkv_bias:
        raise ValueError(
            "ModelConfig: family 'llama' has no biases on queries, keys and values, but qkv_bias "
            "is set; use family 'qwen2'."
        )
    fields = hf_fields(config, model_type="llama", architecture="LlamaForCausalLM")
    return fields | {"attention_bias": False, "mlp_bias": False}


def gguf_fields(metadata: Mapping[str, Any], tensors: Collection[str]) -> dict[str, Any]:
    """GGUF metadata of Llama's relatives, as ModelConfig arguments."""
    prefix = f"{metadata['general.architecture']}."
    ours = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    reader = FieldReader(f"GGUF metadata {prefix}*", ours)
    heads, width = reader.take("attention.head_count"), reader.take("embedding_length")
    head_dim = reader.take("attention.key_length", width // heads)
    reader.require("attention.value_length", head_dim)
    reader.require("rope.dimension_count", head_dim)
    reader.require("rope.scaling.type", "none")
    reader.require("expert_count", 0)
    reader.require("expert_used_count", 0)
    fields = {
        "vocab_size": reader.take("vocab_size", metadata.get("tokens")),
        "hidden_size": width,
        "intermediate_size": reader.take("feed_forward_length"),
        "num_layers": reader.take("block_count"),
        "num_heads": heads,
        "num_kv_heads": reader.take("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": reader.take("rope.freq_base", 10_000.0),
        "norm_eps": reader.take("attention.layer_norm_rms_epsilon"),
        "max_positions": reader.take("context_length"),
        "tie_embeddings": "output.weight" not in tensors,
    }
    reader.finish()
    return fields


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Llama's GGUF metadata."""
    return ModelConfig(**gguf_fields(metadata, tensors))


def tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Every parameter of a decoder, by path, with its names in files."""
    names = {"embedding": TensorName("model.embed_tokens.weight", "token_embd.weight")}
    block = {
        "attention_norm": ("input_layernorm", "attn_norm", None),
        "query": ("self_attn.q_proj", "attn_q", 1),
        "key": ("self_attn.k_proj", "attn_k", 1),
        "value": ("self_attn.v_proj", "attn_v", 1),
        "output": ("self_attn.o_proj", "attn_output", 2),
        "mlp_norm": ("post_attention_layernorm", "ffn_norm", None),
        "gate": ("mlp.gate_proj", "ffn_gate", 1),
        "up": ("mlp.up_proj", "ffn_up", 1),
        "down": ("mlp.down_proj", "ffn_down", 1),
    }
    for name, (hf, gguf, in_axes) in block.items():
        names[f"blocks.{name}"] = TensorName(
            f"model.layers.{{layer}}.{hf}.weight",
            f"blk.{{layer}}.{gguf}.weight",
            in_axes,
            rotary=name in ("query", "key"),
        )
    names["final_norm"] = TensorName("model.norm.weight", "output_norm.weight")
    if not config.tie_embeddings:
        names["head"] = TensorName("lm_head.weight", "output.weight", 1)
    return names


LLAMA = Family(
    name="llama",
    model_types=("llama",),
    gguf_architectures=("llama",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    config_from_gguf=config_from_gguf,
    tensors=tensors,
    gguf_interleaves_rotary=True,
    redundant=(r".*\.rotary_emb\.inv_freq",),
)
