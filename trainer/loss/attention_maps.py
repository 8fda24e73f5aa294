"""The distance between the student's and the teacher's attention maps, a number for each query.

A query counts if its position counts (`loss_mask`), so that this term is divided by the same number
as the others. A query that sees a single key counts but has nothing to learn. Keys that a query
does not see (later positions, other segments) are left out.

With scale = "pairs" the caller divides by `pair_count` in place of the counted positions.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decant.models.decoder.attention import attention_mask
from decant.trainer.loss.settings import AttentionKind, AttentionScale

PROBABILITY_FLOOR = 1e-30
"""Lower clamp on the student's probabilities in the KL, because log 0 is −∞."""

Maps = Float[Array, "batch heads position position"]


def attention_loss(
    student: Float[Array, "batch ours position position"],
    teacher: Float[Array, "batch theirs position position"],
    segment_ids: Int[Array, "batch position"],
    counted: Bool[Array, "batch position"],
    *,
    kind: AttentionKind,
    normalize: bool,
    average_heads: bool,
    scale: AttentionScale = "mean",
) -> Float[Array, ""]:
    """Σ over counted queries of the mean over heads of each row's distance, in float32.

    `kind`: "mse" is the mean over the row's visible keys of the squared difference; "kl" is
    KL(teacher ‖ student) of the row in nats, 0 if the teacher's row is all zeros.
    `normalize` scales each row of both maps to sum to one. `average_heads` compares the means over
    the heads; without it both models must have the same number of heads. `scale` "pairs": the sum,
    in place of the means, over heads and keys of the squared difference.
    """
    seen = attention_mask(segment_ids, segment_ids)[:, None]
    # Uncounted rows are masked too: their stored values may not be finite, and 0·NaN is NaN.
    teacher = jnp.where(seen & counted[:, None, :, None], teacher.astype(jnp.float32), 0.0)
    student = jnp.where(seen, student, 0.0)
    if average_heads:
        student, teacher = (jnp.mean(x, axis=1, keepdims=True) for x in (student, teacher))
    if normalize:
        student, teacher = _row_stochastic(student), _row_stochastic(teacher)
    if scale == "pairs":
        rows = jnp.sum(jnp.square(student - teacher), axis=(1, 3))
    else:
        rows = _squared(student, teacher, seen) if kind == "mse" else _kl(student, teacher)
        rows = jnp.mean(rows, axis=1)
    return jnp.sum(jnp.where(counted, rows, 0.0))


def pair_count(
    segment_ids: Int[Array, "batch position"], counted: Bool[Array, "batch position"]
) -> Float[Array, ""]:
    """Pairs of a counted query and a token of its document, in this row, seen or not.

    A row that is one document whose L positions all count has L² pairs. Documents that share a row
    have no pairs with each other, so packing does not change the number.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.sum(jnp.where(counted, jnp.sum(same, axis=-1), 0).astype(jnp.float32))


def _row_stochastic(maps: Maps) -> Maps:
    """`maps` with rows scaled to sum to one; a row of zeros is unchanged."""
    total = jnp.sum(maps, axis=-1, keepdims=True)
    return maps / jnp.where(total > 0, total, 1.0)


def _squared(
    student: Maps, teacher: Maps, seen: Bool[Array, "batch 1 position position"]
) -> Float[Array, "batch heads position"]:
    keys = jnp.sum(seen, axis=-1)  # at least 1: a query sees itself
    return jnp.sum(jnp.square(student - teacher), axis=-1) / keys


def _kl(student: Maps, teacher: Maps) -> Float[Array, "batch heads position"]:
    # The double where: p·(log p − log q) at p = 0 is 0·(−inf), whose value and gradient are NaN.
    present = teacher > 0
    safe_p = jnp.where(present, teacher, 1.0)
    safe_q = jnp.where(present, jnp.maximum(student, PROBABILITY_FLOOR), 1.0)
    terms = safe_p * (jnp.log(safe_p) - jnp.log(safe_q))
    return jnp.sum(jnp.where(present, terms, 0.0), axis=-1)
