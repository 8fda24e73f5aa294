"""Exact top-k on the device, in stages: what `lax.top_k` gives, in a third of its time on a CPU.

Values descend, equals stand by the lower id. The k blocks with the largest maxima hold the top k:
any other block has k values before it that are at least as large and, where equal, of lower ids.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from decant.models.mesh.vocabulary import Vocabulary

# 16 to 128 are within a third of each other at 131,072 ids and k = 64; benchmarks/top_k.py.
_BLOCK = 32


def top_k(
    logits: Float[Array, "tokens width"], k: int, *, vocabulary: Vocabulary
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
    """The k largest logits of the whole vocabulary and their ids (int32), on every device.

    `logits` are this device's columns; each device sends k numbers a token.
    """
    width = logits.shape[-1]
    values, ids = exact_top_k(logits, min(k, width))
    if vocabulary.axis is None:
        return values, ids
    # In the devices' order, so that equals are met by the lower id again.
    values = vocabulary.gather_columns(values)
    ids = vocabulary.gather_columns(ids + vocabulary.first_id(width))
    values, at = lax.top_k(values, k)
    return values, jnp.take_along_axis(ids, at, axis=-1)


def exact_top_k(
    values: Float[Array, "tokens width"], k: int
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
    """The k largest of each row and their columns (int32); `lax.top_k` where stages cannot help."""
    tokens, width = values.shape
    blocks = -(-width // _BLOCK)
    if k > blocks // 2:
        found, at = lax.top_k(values, k)
        return found, at
    padded = jnp.pad(values, ((0, 0), (0, blocks * _BLOCK - width)), constant_values=-jnp.inf)
    grouped = padded.reshape(tokens, blocks, _BLOCK)
    _, chosen = exact_top_k(jnp.max(grouped, axis=-1), k)
    chosen = jnp.sort(chosen, axis=-1)  # so that equal values meet top_k in the order of ids
    candidates = jnp.take_along_axis(grouped, chosen[:, :, None], axis=1)
    found, at = lax.top_k(candidates.reshape(tokens, k * _BLOCK), k)
    block = jnp.take_along_axis(chosen, at // _BLOCK, axis=-1)
    return found, block * _BLOCK + at % _BLOCK
