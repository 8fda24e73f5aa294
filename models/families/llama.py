"""Llama 2 to 3.2 and models that are Llama by another name (SmolLM): files ↔ config."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from decant.models.config import ModelConfig
from decant.models.families.family import Family, FieldReader, TensorName
from decant.models.rotary import LinearScaling, Llama3Scaling, Scaling, frequencies

# Fields of config.json that say how a model was made, stored or sampled from.
BOOKKEEPING = (
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "cache_implementation",
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
    "tokenizer_class",
    "transformers_version",
    "unk_token_id",
    "use_cache",
)


def shared_fields(
    reader: FieldReader, *, head_dim: int | None = None, tied: bool = False
) -> dict[str, Any]:
    """The config.json fields that Llama's relatives spell alike, as ModelConfig arguments.

    `head_dim` and `tied` are the family's defaults. Rotary fields: see `rope_fields`.
    """
    reader.ignore(*BOOKKEEPING)
    reader.require("rope_interleaved", False)
    heads, width = reader.take("num_attention_heads"), reader.take("hidden_size")
    return {
        "vocab_size": reader.take("vocab_size"),
        "hidden_size": width,
        "intermediate_size": reader.take("intermediate_size"),
        "num_layers": reader.take("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": reader.take("num_key_value_heads", heads),
        "head_dim": reader.take("head_dim", head_dim or width // heads),
        "norm_eps": float(reader.take("rms_norm_eps", 1e-6)),
        "max_positions": reader.take("max_position_embeddings"),
        "tie_embeddings": reader.take("tie_word_embeddings", tied),
    }


def rope_fields(reader: FieldReader) -> dict[str, Any]:
    """rope_theta and rope_scaling of a model that has one rotation."""
    # Transformers 5 writes rope_parameters, earlier ones rope_theta beside rope_scaling.
    theta, scaling = reader.take("rope_theta", 10_000.0), None
    longest = reader.take("max_position_embeddings")
    for name in ("rope_scaling", "rope_parameters"):
        rope = FieldReader(f"{reader.where}: {name}", reader.take(name, {}))
        theta = rope.take("rope_theta", theta)
        scaling = read_scaling(rope, max_positions=longest) or scaling
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def read_scaling(rope: FieldReader, *, max_positions: int) -> Scaling | None:
    """How a rotation is scaled; takes every field that is left of `rope`."""
    old_name = rope.take("type", "default")
    kind = rope.take("rope_type", old_name)
    scaling = None
    if kind == "linear":
        scaling = LinearScaling(float(rope.take("factor")))
    elif kind == "llama3":
        scaling = Llama3Scaling(
            factor=float(rope.take("factor")),
            low_freq_factor=float(rope.take("low_freq_factor")),
            high_freq_factor=float(rope.take("high_freq_factor")),
            original_max_positions=rope.take("original_max_position_embeddings", max_positions),
        )
    else:
        rope.require("rope_type", "default", "linear", "llama3")
        rope.require("type", "default", "linear", "llama3")
    rope.finish()
    return scaling


def hf_scaling(scaling: Scaling | None) -> dict[str, Any] | None:
    """Inverse of `read_scaling`, in the spelling that transformers 4 and 5 both read."""
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


def hf_fields(config: ModelConfig, *, model_type: str, architecture: str) -> dict[str, Any]:
    """Inverse of `shared_fields` and `rope_fields`."""
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
        "hidden_act": "silu" if config.activation == "silu" else "gelu_pytorch_tanh",
        # Both transformers 4 and 5 read this spelling.
        "rope_theta": config.rope_theta,
        "rope_scaling": hf_scaling(config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
    }


def config_from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Llama's config.json."""
    reader = FieldReader("config.json", fields)
    reader.require("hidden_act", "silu")
    config = ModelConfig(**shared_fields(reader), **rope_fields(reader))
    # Llama's attention_bias also puts a bias on the output projection, which we have not.
    reader.require("attention_bias", False)
    reader.require("mlp_bias", False)
    reader.require("sliding_window", None)
    reader.finish()
    return config


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json for a model without biases."""
    fields = hf_fields(config, model_type="llama", architecture="LlamaForCausalLM")
    return fields | {"attention_bias": False, "mlp_bias": False}


def gguf_reader(metadata: Mapping[str, Any]) -> FieldReader:
    """The fields of a GGUF file that describe its architecture."""
    prefix = f"{metadata['general.architecture']}."
    ours = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    return FieldReader(f"GGUF metadata {prefix}*", ours)


def gguf_fields(
    reader: FieldReader, metadata: Mapping[str, Any], tensors: Collection[str]
) -> dict[str, Any]:
    """GGUF metadata of Llama's relatives, as ModelConfig arguments."""
    heads, width = reader.take("attention.head_count"), reader.take("embedding_length")
    head_dim = reader.take("attention.key_length", width // heads)
    reader.require("attention.value_length", head_dim)
    reader.require("rope.dimension_count", head_dim)
    reader.require("rope.scaling.type", "none")
    theta = reader.take("rope.freq_base", 10_000.0)
    return {
        "vocab_size": reader.take("vocab_size", metadata.get("tokens")),
        "hidden_size": width,
        "intermediate_size": reader.take("feed_forward_length"),
        "num_layers": reader.take("block_count"),
        "num_heads": heads,
        "num_kv_heads": reader.take("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": theta,
        "rope_scaling": _gguf_scaling(metadata, head_dim=head_dim, theta=theta),
        "norm_eps": reader.take("attention.layer_norm_rms_epsilon"),
        "max_positions": reader.take("context_length"),
        "tie_embeddings": "output.weight" not in tensors,
    }


def _gguf_scaling(metadata: Mapping[str, Any], *, head_dim: int, theta: float) -> Scaling | None:
    """Llama 3's scaling, which GGUF keeps as what each frequency is divided by.

    What it was made from is not in the file, but Llama 3.1 to 3.3 differ in `factor` only, and that
    is what the lowest frequency is divided by.
    """
    if "rope_freqs" not in metadata:
        return None
    divisors = np.asarray(metadata["rope_freqs"], np.float32)
    scaling = Llama3Scaling(float(round(divisors.max(), 3)), 1.0, 4.0, 8192)
    plain = frequencies(head_dim=head_dim, theta=theta)
    if divisors.shape != plain.shape or not np.allclose(
        divisors, plain / scaling.applied(plain), rtol=1e-4
    ):
        raise ValueError(
            "GGUF tensor rope_freqs.weight: not the scaling of Llama 3.1 to 3.3 (low and high "
            "frequency factors 1 and 4 over 8192 positions), the only one we can tell from it. "
            "Use the model's Hugging Face directory, whose config.json states it."
        )
    return scaling


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Llama's GGUF metadata."""
    reader = gguf_reader(metadata)
    reader.require("expert_count", 0)
    reader.require("expert_used_count", 0)
    fields = gguf_fields(reader, metadata, tensors)
    reader.finish()
    return ModelConfig(**fields)


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
    redundant=(r".*\.rotary_emb\.inv_freq", r"rope_freqs\.weight"),
)
