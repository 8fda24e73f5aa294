"""Exact top-k on the device, in stages: same result as `lax.top_k`, a third of its time on a CPU.

Values descend; equal values are ordered by id. The k blocks with the largest maxima contain the
top k: for every value of another block there are k values, at least as large, that precede it.
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
    # Gathered in the order of ids, so that equal values are again ordered by id.
    values = vocabulary.gather_columns(values)
    ids = vocabulary.gather_columns(ids + vocabulary.first_id(width))
    values, at = lax.top_k(values, k)
    return values, jnp.take_along_axis(ids, at, axis=-1)


def exact_top_k(
    values: Float[Array, "tokens width"], k: int
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
    """The k largest of each row and their columns (int32); by `lax.top_k` if stages are slower."""
    tokens, width = values.shape
    blocks = -(-width // _BLOCK)
    if k > blocks // 2:
        largest, columns = lax.top_k(values, k)
        return largest, columns
    padded = jnp.pad(values, ((0, 0), (0, blocks * _BLOCK - width)), constant_values=-jnp.inf)
    grouped = padded.reshape(tokens, blocks, _BLOCK)
    _, chosen = exact_top_k(jnp.max(grouped, axis=-1), k)
    chosen = jnp.sort(chosen, axis=-1)  # so that top_k sees equal values in the order of ids
    candidates = jnp.take_along_axis(grouped, chosen[:, :, None], axis=1)
    largest, at = lax.top_k(candidates.reshape(tokens, k * _BLOCK), k)
    block = jnp.take_along_axis(chosen, at // _BLOCK, axis=-1)
    return largest, block * _BLOCK + at % _BLOCK
