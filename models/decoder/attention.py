"""Causal attention inside segments, exact for packed rows, nothing above the diagonal computed.

Query t sees key s when s ≤ t and both lie in the same segment; with a window w also t − s < w.
Padding (segment 0) is a segment like any other, so no query is ever left without a key.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from decant.models.numerics import contract, soft_cap

# Queries handled at once. Smaller blocks waste fewer masked products above the
# diagonal, larger ones make better matrix products; 128 to 256 measured alike.
QUERY_BLOCK = 256

Window = Int[Array, ""] | int | None
"""Positions that a query sees, itself included. It may differ from block to block of a model, which
are scanned over, so it may be an array; None: all."""


def attend(
    queries: Float[Array, "batch time heads head_dim"],
    keys: Float[Array, "batch time kv_heads head_dim"],
    values: Float[Array, "batch time kv_heads head_dim"],
    segment_ids: Int[Array, "batch time"],
    window: Window = None,
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "batch time heads head_dim"]:
    """Softmax of scale · scores, capped; softmax in float32, output in queries' dtype."""
    # Where cuDNN's kernel cannot be had, XLA's version builds the whole [T, T] score matrix,
    # masked half included, so blocks of queries win there too.
    if jax.default_backend() == "gpu" and softcap is None and _fits_cudnn(queries):
        return fused(queries, keys, values, segment_ids, window, scale=scale)
    # Training keeps the arguments only: probabilities are T² numbers a head, and computing
    # them again costs one product of the backward pass's five.
    explicit = jax.checkpoint(partial(blockwise, scale=scale, softcap=softcap), prevent_cse=False)
    return explicit(queries, keys, values, segment_ids, window)


def blockwise(
    queries: Float[Array, "batch time heads head_dim"],
    keys: Float[Array, "batch time kv_heads head_dim"],
    values: Float[Array, "batch time kv_heads head_dim"],
    segment_ids: Int[Array, "batch time"],
    window: Window = None,
    *,
    scale: float,
    softcap: float | None = None,
    block: int = QUERY_BLOCK,
) -> Float[Array, "batch time heads head_dim"]:
    """A static loop over blocks of queries; each meets only the keys up to its own end."""
    batch, time, heads, head_dim = queries.shape
    shared = keys.shape[2]
    q_BKGTh = queries.reshape(batch, time, shared, heads // shared, head_dim)
    q_BKGTh = q_BKGTh.transpose(0, 2, 3, 1, 4)
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
                scale=scale,
                softcap=softcap,
            )
        )
    out_BKGTh = jnp.concatenate(outputs, axis=3)
    return out_BKGTh.transpose(0, 3, 1, 2, 4).reshape(queries.shape)


def attention_probabilities(
    queries: Float[Array, "batch time heads head_dim"],
    keys: Float[Array, "batch time kv_heads head_dim"],
    segment_ids: Int[Array, "batch time"],
    window: Window = None,
    *,
    heads: Sequence[int],
    scale: float,
    softcap: float | None = None,
    keep: Callable[[Array], Array] | None = None,
    block: int = QUERY_BLOCK,
) -> Shaped[Array, "batch chosen time time"]:
    """What `attend` weighs values with, of the chosen heads: probabilities in float32.

    [batch, head, query, key]: each query's row sums to one over the keys that it sees and is zero
    elsewhere. `keep` turns a block of queries' probabilities [batch, chosen, queries, keys] into
    what is returned of them (narrower codes, a mean over heads), so that float32 never exists for
    all queries at once; it must leave zero zero.
    """
    chosen, group = np.asarray(heads), queries.shape[2] // keys.shape[2]
    q_BHTh = queries[:, :, chosen].transpose(0, 2, 1, 3)
    k_BHTh = keys[:, :, chosen // group].transpose(0, 2, 1, 3)
    time = queries.shape[1]
    rows = []
    for start in range(0, time, block):
        end = min(start + block, time)
        seen = attention_mask(segment_ids[:, start:end], segment_ids[:, :end], window, offset=start)
        scores = contract("bhqd,bhsd->bhqs", q_BHTh[:, :, start:end], k_BHTh[:, :, :end])
        probabilities = _softmax(scores, seen[:, None], scale=scale, softcap=softcap)
        probabilities = keep(probabilities) if keep else probabilities
        rows.append(jnp.pad(probabilities, ((0, 0), (0, 0), (0, 0), (0, time - end))))
    return jnp.concatenate(rows, axis=2)


def attention_mask(
    query_segments: Int[Array, "batch queries"],
    key_segments: Int[Array, "batch keys"],
    window: Window = None,
    *,
    offset: int = 0,
) -> Array:
    """Which keys each query may see, bool [batch, queries, keys]; query i stands at offset + i."""
    distance = offset + jnp.arange(query_segments.shape[1])[:, None]
    distance -= jnp.arange(key_segments.shape[1])
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return near & (query_segments[:, :, None] == key_segments[:, None, :])


def _query_block(
    q_BKGqh: Array,
    k_BKsh: Array,
    v_BKsh: Array,
    mask_Bqs: Array,
    *,
    scale: float,
    softcap: float | None,
) -> Array:
    scores = contract("bkgqh,bksh->bkgqs", q_BKGqh, k_BKsh)
    weights = _softmax(scores, mask_Bqs[:, None, None], scale=scale, softcap=softcap)
    weights = weights.astype(q_BKGqh.dtype)
    return contract("bkgqs,bksh->bkgqh", weights, v_BKsh).astype(q_BKGqh.dtype)


def _softmax(scores: Array, seen: Array, *, scale: float, softcap: float | None) -> Array:
    """Probabilities over the seen keys, the last axis; in float32."""
    capped = soft_cap(scores * scale, softcap)
    return jax.nn.softmax(jnp.where(seen, capped, -jnp.inf), axis=-1)


def _fits_cudnn(queries: Array) -> bool:
    """The kernel takes 16-bit operands; widths and lengths as its backward pass needs them."""
    _, time, _, head_dim = queries.shape
    return queries.dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128 and time % 2 == 0


def fused(
    queries: Float[Array, "batch time heads head_dim"],
    keys: Float[Array, "batch time kv_heads head_dim"],
    values: Float[Array, "batch time kv_heads head_dim"],
    segment_ids: Int[Array, "batch time"],
    window: Window = None,
    *,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "batch time heads head_dim"]:
    """One kernel for scores, softmax and mixing; it skips what is above the diagonal."""
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
