"""The config.json fields that Llama and its relatives spell alike: sizes, rotary positions."""

from __future__ import annotations

from typing import Any

from decant.models.config import ModelConfig
from decant.models.families.field_reader import FieldReader
from decant.models.rotary import LinearScaling, Llama3Scaling, Scaling

# Fields that say how a model was made, stored or sampled from.
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


def read_common(
    reader: FieldReader, *, head_dim: int | None = None, tied: bool = False
) -> dict[str, Any]:
    """Sizes and norms as ModelConfig arguments; `read_rotary` reads the rotary fields.

    `head_dim` and `tied` are the family's defaults. Without a default, head_dim is the width
    divided by the number of heads.
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


def read_rotary(reader: FieldReader) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a model that has one rotation for all blocks."""
    # Transformers 5 writes rope_parameters, earlier ones rope_theta beside rope_scaling.
    theta, scaling = reader.take("rope_theta", 10_000.0), None
    longest = reader.take("max_position_embeddings")
    for name in ("rope_scaling", "rope_parameters"):
        rope = FieldReader(f"{reader.where}: {name}", reader.take(name, {}))
        theta = rope.take("rope_theta", theta)
        scaling = read_scaling(rope, max_positions=longest) or scaling
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def read_scaling(rope: FieldReader, *, max_positions: int) -> Scaling | None:
    """How a rotation is scaled, None for not at all. Finishes `rope`, the rotation's fields.

    `max_positions`: the model's, which Llama 3's scaling falls back to.
    """
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


def write_common(config: ModelConfig, *, model_type: str, architecture: str) -> dict[str, Any]:
    """Inverse of `read_common` and `read_rotary`.

    `architecture` is the transformers class that runs the model.
    """
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
        "rope_scaling": _write_scaling(config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _write_scaling(scaling: Scaling | None) -> dict[str, Any] | None:
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
