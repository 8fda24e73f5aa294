"""The distance between the student's and the teacher's hidden states, a number for each position.

A distance is a mean over the width, so that the width does not change its scale, or a sum over it
(scale = "sum"). The result is a sum over counted positions; the caller divides it by the counted
tokens of the whole batch.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from decant.models.numerics import contract
from decant.trainer.loss.settings import HiddenKind, HiddenScale


def hidden_loss(
    student: Float[Array, "batch position width"],
    teacher: Float[Array, "batch position stored"],
    counted: Bool[Array, "batch position"],
    *,
    kind: HiddenKind,
    scale: HiddenScale = "mean",
    matrix: Float[Array, "width stored"] | None = None,
) -> Float[Array, ""]:
    """Σ over counted positions of the distance, in float32.

    `matrix` maps the student's states before they are compared: a trained projection, or the
    principal directions along which the teacher's states are stored. None: both widths are equal.
    The teacher's states at uncounted positions may hold any values, NaN too.
    """
    student = student.astype(jnp.float32)
    if matrix is not None:
        student = contract("btd,de->bte", student, matrix)
    # The double where: an uncounted state that is not finite would give a gradient of 0·NaN.
    teacher = jnp.where(counted[..., None], teacher.astype(jnp.float32), 0.0)
    distance = _squared if kind == "mse" else _one_minus_cosine
    total = jnp.sum(jnp.where(counted, distance(student, teacher), 0.0))
    return total * teacher.shape[-1] if scale == "sum" else total


def _squared(
    a: Float[Array, "*position width"], b: Float[Array, "*position width"]
) -> Float[Array, " *position"]:
    return jnp.mean(jnp.square(a - b), axis=-1)


def _one_minus_cosine(
    a: Float[Array, "*position width"], b: Float[Array, "*position width"]
) -> Float[Array, " *position"]:
    """In [0, 2]. If either vector is zero, which has no direction: 1 with zero gradient."""
    return 1 - jnp.sum(_direction(a) * _direction(b), axis=-1)


def _direction(x: Float[Array, "*position width"]) -> Float[Array, "*position width"]:
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    nonzero = square > 0
    return x * jnp.where(nonzero, lax.rsqrt(jnp.where(nonzero, square, 1.0)), 0.0)
