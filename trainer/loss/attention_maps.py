"""How far the student's attention maps are from the teacher's, a number for each query.

A query counts where its position does (`loss_mask`), so that this term is divided by the same
number as the others; a query that sees one key only counts and has nothing to learn. Keys that it
does not see (later ones, other segments) take no part.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decant.models.decoder.attention import attention_mask
from decant.trainer.loss.settings import AttentionKind

FLOOR = 1e-30
"""Least probability of the student that the KL tells from zero, whose logarithm is −∞."""

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
) -> Float[Array, ""]:
    """Σ over counted queries of the mean over heads of each row's distance, in float32.

    `mse` is the mean over the row's visible keys, `kl` the KL(teacher ‖ student) of the row in
    nats; a teacher's row of zeros has none. `average_heads` compares means over the heads, which
    need not be equally many then.
    """
    seen = attention_mask(segment_ids, segment_ids)[:, None]
    # Uncounted rows too: what is stored there may not be finite, and 0·NaN is NaN.
    teacher = jnp.where(seen & counted[:, None, :, None], teacher.astype(jnp.float32), 0.0)
    student = jnp.where(seen, student, 0.0)
    if average_heads:
        student, teacher = (jnp.mean(x, axis=1, keepdims=True) for x in (student, teacher))
    if normalize:
        student, teacher = _row_stochastic(student), _row_stochastic(teacher)
    rows = _squared(student, teacher, seen) if kind == "mse" else _kl(student, teacher)
    return jnp.sum(jnp.where(counted, jnp.mean(rows, axis=1), 0.0))


def _row_stochastic(maps: Maps) -> Maps:
    """Rows that sum to one; a row of zeros stays one."""
    total = jnp.sum(maps, axis=-1, keepdims=True)
    return maps / jnp.where(total > 0, total, 1.0)


def _squared(
    student: Maps, teacher: Maps, seen: Bool[Array, "batch 1 position position"]
) -> Float[Array, "batch heads position"]:
    keys = jnp.sum(seen, axis=-1)  # A query sees itself at least.
    return jnp.sum(jnp.square(student - teacher), axis=-1) / keys


def _kl(student: Maps, teacher: Maps) -> Float[Array, "batch heads position"]:
    # The double where: p·(log p − log q) at p = 0 is 0·(−inf), whose value and gradient are NaN.
    some = teacher > 0
    safe_p = jnp.where(some, teacher, 1.0)
    safe_q = jnp.where(some, jnp.maximum(student, FLOOR), 1.0)
    terms = safe_p * (jnp.log(safe_p) - jnp.log(safe_q))
    return jnp.sum(jnp.where(some, terms, 0.0), axis=-1)
