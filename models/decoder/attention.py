"""Causal attention inside segments, exact for packed rows.

Query t sees key s if s ≤ t and both lie in the same segment; with a window w, also t − s < w.
Padding (segment 0) is a segment like any other, so every query sees at least one key.
Products of queries with later keys are not computed, except inside diagonal blocks.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from decant.models.numerics import contract, soft_cap

# Queries per block. Smaller blocks compute fewer masked products above the diagonal, larger ones
# make better matrix products; 128 to 256 measured alike.
QUERY_BLOCK = 256

Window = Int[Array, ""] | int | None
"""How many positions a query sees, itself included; None: all. It may be an array, because a scan
over a model's blocks can give each block another window."""


def attend(
    queries: Float[Array, "batch time heads head_dim"],
    keys: Float[Array, "batch time kv_heads head_dim"],
    values: Float[Array, "batch time kv_heads value_dim"],
    segment_ids: Int[Array, "batch time"],
    window: Window = None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "batch time heads value_dim"]:
    """Attention outputs of every head, in the dtype of `queries`; the softmax is in float32.

    Args:
        queries: rotary positions applied.
        keys: rotary positions applied; each key/value head serves heads / kv_heads query heads.
        values: as many heads as `keys`.
        segment_ids: 0 is padding.
        window: see `Window`.
        scale: factor of the scores.
        softcap: cap of the scaled scores, see `numerics.soft_cap`; None is no cap.
        sinks: a score of each head that takes part in the softmax and belongs to no key.
    """
    # Without cuDNN's kernel, XLA's attention would build the whole [T, T] score matrix, masked
    # half included. Blocks of queries are faster there, as on other backends.
    if (
        jax.default_backend() == "gpu"
        and softcap is None
        and sinks is None
        and _fits_cudnn(queries)
        and values.shape[-1] == queries.shape[-1]
    ):
        return fused(queries, keys, values, segment_ids, window, scale=scale)
    # Training keeps the arguments only. Probabilities are T² numbers per head, and computing them
    # again costs one of the backward pass's five products.
    explicit = jax.checkpoint(partial(blockwise, scale=scale, softcap=softcap), prevent_cse=False)
    return explicit(queries, keys, values, segment_ids, window, sinks)


def blockwise(
    queries: Float[Array, "batch time heads head_dim"],
    keys: Float[Array, "batch time kv_heads head_dim"],
    values: Float[Array, "batch time kv_heads value_dim"],
    segment_ids: Int[Array, "batch time"],
    window: Window = None,
    sinks: Float[Array, " heads"] | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    block: int = QUERY_BLOCK,
) -> Float[Array, "batch time heads value_dim"]:
    """`attend` as a static loop over blocks of queries; each block meets the keys up to its end."""
    batch, time, heads, head_dim = queries.shape
    shared = keys.shape[2]
    q_BKGTh = queries.reshape(batch, time, shared, heads // shared, head_dim)
    q_BKGTh = q_BKGTh.transpose(0, 2, 3, 1, 4)
    grouped = None if sinks is None else sinks.reshape(shared, heads // shared)
    k_BKTh, v_BKTh = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
    outputs = []
    for start in range(0, time, block):
        end = min(start + block, time)
        outputs.append(
            _query_block(
                q_BKGTh[:, :, :, start:end],
                k_BKTh[:, :, :end],
                v_BKTh[:, :, :end],
                attention_mask(
                    segment_ids[:, start:end], segment_ids[:, :end], window, offset=start
                ),
                grouped,
                scale=scale,
                softcap=softcap,
            )
        )
    out_BKGTh = jnp.concatenate(outputs, axis=3)
    return out_BKGTh.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, -1)


def attend_past(
    queries: Float[Array, "batch time heads head_dim"],
    keys: Float[Array, "batch slots kv_heads head_dim"],
    values: Float[Array, "batch slots kv_heads value_dim"],
    query_segments: Int[Array, "batch time"],
    key_segments: Int[Array, "batch slots"],
    window: Window = None,
    *,
    offset: Int[Array, ""],
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "batch time heads value_dim"]:
    """`attend` for the few tokens in slots `offset`, `offset` + 1, … of rows of kept keys.

    `keys` and `values` hold those of the queries' own tokens too. Slots after a query's own are
    not seen, whatever they hold.
    """
    batch, time, heads, head_dim = queries.shape
    shared = keys.shape[2]
    q_BKGTh = queries.reshape(batch, time, shared, heads // shared, head_dim)
    out_BKGTh = _query_block(
        q_BKGTh.transpose(0, 2, 3, 1, 4),
        keys.transpose(0, 2, 1, 3),
        values.transpose(0, 2, 1, 3),
        attention_mask(query_segments, key_segments, window, offset=offset),
        None if sinks is None else sinks.reshape(shared, heads // shared),
        scale=scale,
        softcap=softcap,
    )
    return out_BKGTh.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, -1)


def attention_probabilities(
    queries: Float[Array, "batch time heads head_dim"],
    keys: Float[Array, "batch time kv_heads head_dim"],
    segment_ids: Int[Array, "batch time"],
    window: Window = None,
    *,
    heads: Sequence[int],
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    keep: Callable[[Array], Array] | None = None,
    block: int = QUERY_BLOCK,
) -> Shaped[Array, "batch chosen time time"]:
    """The probabilities of the chosen heads, [batch, head, query, key], float32 without `keep`.

    Each query's row sums to one over the keys that it sees (to less where a head has a sink) and is
    zero elsewhere.

    Args:
        queries: as for `attend`.
        keys: as for `attend`.
        segment_ids: as for `attend`.
        window: as for `attend`.
        heads: which query heads, in this order.
        scale: as for `attend`.
        softcap: as for `attend`.
        sinks: as for `attend`, of all heads.
        keep: converts the probabilities [batch, chosen, queries, keys] of each block of queries,
            for example to narrower codes or a mean over heads. So float32 never exists for all
            queries at once. It must map zero to zero, because later keys are padded with zero.
        block: queries per block.
    """
    chosen, group = np.asarray(heads), queries.shape[2] // keys.shape[2]
    q_BHTh = queries[:, :, chosen].transpose(0, 2, 1, 3)
    k_BHTh = keys[:, :, chosen // group].transpose(0, 2, 1, 3)
    time = queries.shape[1]
    of_heads = None if sinks is None else sinks[chosen]
    rows = []
    for start in range(0, time, block):
        end = min(start + block, time)
        seen = attention_mask(segment_ids[:, start:end], segment_ids[:, :end], window, offset=start)
        scores = contract("bhqd,bhsd->bhqs", q_BHTh[:, :, start:end], k_BHTh[:, :, :end])
        probabilities = _softmax(scores, seen[:, None], of_heads, scale=scale, softcap=softcap)
        probabilities = keep(probabilities) if keep else probabilities
        rows.append(jnp.pad(probabilities, ((0, 0), (0, 0), (0, 0), (0, time - end))))
    return jnp.concatenate(rows, axis=2)


def attention_mask(
    query_segments: Int[Array, "batch queries"],
    key_segments: Int[Array, "batch keys"],
    window: Window = None,
    *,
    offset: Int[Array, ""] | int = 0,
) -> Array:
    """Whether a query sees a key, bool [batch, queries, keys].

    Query i stands at position offset + i of the row, key j at position j.
    """
    distance = offset + jnp.arange(query_segments.shape[1])[:, None]
    distance -= jnp.arange(key_segments.shape[1])
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return near & (query_segments[:, :, None] == key_segments[:, None, :])


def _query_block(
    q_BKGqh: Array,
    k_BKsh: Array,
    v_BKsh: Array,
    mask_Bqs: Array,
    sinks_KG: Array | None,
    *,
    scale: float,
    softcap: float | None,
) -> Array:
    scores = contract("bkgqh,bksh->bkgqs", q_BKGqh, k_BKsh)
    seen = mask_Bqs[:, None, None]
    weights = _softmax(scores, seen, sinks_KG, scale=scale, softcap=softcap)
    weights = weights.astype(q_BKGqh.dtype)
    return contract("bkgqs,bksh->bkgqh", weights, v_BKsh).astype(q_BKGqh.dtype)


def _softmax(
    scores: Array, seen: Array, sinks: Array | None, *, scale: float, softcap: float | None
) -> Array:
    """Probabilities over the last axis, in float32; `seen` says which keys a query sees.

    `sinks` has the axes of heads of `scores`, which has two more after them.
    """
    scores = jnp.where(seen, soft_cap(scores * scale, softcap), -jnp.inf)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = jnp.broadcast_to(sinks.astype(jnp.float32)[..., None, None], (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]


def _fits_cudnn(queries: Array) -> bool:
    """Whether cuDNN's kernel and its backward pass take operands of this dtype and shape."""
    _, time, _, head_dim = queries.shape
    return queries.dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128 and time % 2 == 0


def fused(
    queries: Float[Array, "batch time heads head_dim"],
    keys: Float[Array, "batch time kv_heads head_dim"],
    values: Float[Array, "batch time kv_heads value_dim"],
    segment_ids: Int[Array, "batch time"],
    window: Window = None,
    *,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "batch time heads value_dim"]:
    """`attend` as one kernel for scores, softmax and weighted sum, without a soft cap.

    The cuDNN kernel skips blocks above the diagonal.
    """
    mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    if window is not None:
        mask = attention_mask(segment_ids, segment_ids, window)[:, None]
    return jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        mask=mask,
        is_causal=True,
        scale=scale,
        implementation=implementation,
    )
