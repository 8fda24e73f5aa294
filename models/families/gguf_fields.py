"""The GGUF metadata that Llama and its relatives spell alike."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from decant.models.families.field_reader import FieldReader
from decant.models.rotary import Llama3Scaling, Scaling, frequencies


def architecture_fields(metadata: Mapping[str, Any]) -> FieldReader:
    """A reader of the fields that describe the file's architecture, without their prefix."""
    prefix = f"{metadata['general.architecture']}."
    ours = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    return FieldReader(f"GGUF metadata {prefix}*", ours)


def read_common(
    reader: FieldReader, metadata: Mapping[str, Any], tensors: Collection[str]
) -> dict[str, Any]:
    """Sizes, norms and rotary positions as ModelConfig arguments.

    Args:
        reader: `architecture_fields(metadata)`.
        metadata: all of the file's metadata.
        tensors: names of the file's tensors; without an output matrix the embedding is tied.
    """
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
        "rope_scaling": _read_scaling(metadata, head_dim=head_dim, theta=theta),
        "norm_eps": reader.take("attention.layer_norm_rms_epsilon"),
        "max_positions": reader.take("context_length"),
        "tie_embeddings": "output.weight" not in tensors,
    }


def _read_scaling(metadata: Mapping[str, Any], *, head_dim: int, theta: float) -> Scaling | None:
    """Llama 3's scaling, of which GGUF keeps only the divisor of each frequency.

    The parameters of the scaling are not in the file. But Llama 3.1 to 3.3 differ in `factor`
    only, and `factor` is the divisor of the lowest frequency.
    """
    if "rope_freqs" not in metadata:
        return None
    divisors = np.asarray(metadata["rope_freqs"], np.float32)
    scaling = Llama3Scaling(float(round(divisors.max(), 3)), 1.0, 4.0, 8192)
    plain = frequencies(head_dim=head_dim, theta=theta)
    if divisors.shape != plain.shape or not np.allclose(
        divisors, plain / scaling.apply(plain), rtol=1e-4
    ):
        raise ValueError(
            "GGUF tensor rope_freqs.weight: not the scaling of Llama 3.1 to 3.3 (low and high "
            "frequency factors 1 and 4 over 8192 positions), the only one we can tell from it. "
            "Use the model's Hugging Face directory, whose config.json states it."
        )
    return scaling
