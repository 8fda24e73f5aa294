"""Cutting a batch's positions into chunks, so that only one chunk's logits exist at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

_ACCELERATOR_LOGITS = 1 << 27
"""Logits of a chunk on an accelerator: 512 MiB of float32."""


def tokens_at_once(asked: int | None, *, vocabulary: int) -> int:
    """`asked`, the setting `loss.chunk_tokens`, or the default of this device if that is None."""
    if asked is not None:
        return asked
    # A CPU's caches hold few logits. The larger products of an accelerator's chunks, and fewer
    # passes over the unembedding's gradient, were 10% of a 135M student's update on an H200.
    if jax.default_backend() == "cpu":
        return 256
    return max(1, _ACCELERATOR_LOGITS // vocabulary)


def positions_at_once(asked: int | None, *, rows: int, length: int, vocabulary: int) -> int:
    """Positions of every row in one chunk, so that a chunk has at most `tokens_at_once` tokens.

    Chunks are even, so that the last one is not mostly padding.
    """
    most = max(1, tokens_at_once(asked, vocabulary=vocabulary) // rows)
    chunks = -(-length // most)
    return -(-length // chunks)


def cut_positions(arrays: Any, step: int) -> Any:
    """Arrays [batch, position, …] as [chunk, batch, step, …].

    The last chunk is padded with zeros, which a mask marks as uncounted. Chunks are cut along
    positions, so that each device keeps its rows.
    """

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % step)] + [(0, 0)] * (x.ndim - 2))
        chunks = x.shape[1] // step  # not −1: with k = 0 an axis is empty
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, step, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, arrays)


def flatten_rows(chunk: Any) -> Any:
    """Arrays [batch, step, …] of one chunk as [batch · step, …]."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), chunk)


def join_positions(
    x: Shaped[Array, "chunk batch step ..."], *, length: int
) -> Shaped[Array, "batch position ..."]:
    """The inverse of `cut_positions` for rows of `length` positions: padding is dropped."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :length]
