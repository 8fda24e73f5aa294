"""How far the student's hidden states are from the teacher's, a number for each position.

A mean over the width, so that it does not change the scale. The sum over counted positions is
left to be divided by the counted tokens of the whole batch, as every part of the loss is.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from decant.models.numerics import contract
from decant.trainer.loss.settings import HiddenKind


def hidden_loss(
    student: Float[Array, "batch position width"],
    teacher: Float[Array, "batch position stored"],
    counted: Bool[Array, "batch position"],
    *,
    kind: HiddenKind,
    matrix: Float[Array, "width stored"] | None = None,
) -> Float[Array, ""]:
    """Σ over counted positions of the distance, in float32; widths are equal without a `matrix`.

    `matrix` maps the student's states first: a trained projection, or the principal directions
    that the teacher's are stored along. What is stored where nothing is counted may be anything.
    """
    student = student.astype(jnp.float32)
    if matrix is not None:
        student = contract("btd,de->bte", student, matrix)
    # The double where: a state that is not finite would make a gradient of 0·NaN.
    teacher = jnp.where(counted[..., None], teacher.astype(jnp.float32), 0.0)
    distance = _squared if kind == "mse" else _one_minus_cosine
    return jnp.sum(jnp.where(counted, distance(student, teacher), 0.0))


def _squared(
    a: Float[Array, "*position width"], b: Float[Array, "*position width"]
) -> Float[Array, " *position"]:
    return jnp.mean(jnp.square(a - b), axis=-1)


def _one_minus_cosine(
    a: Float[Array, "*position width"], b: Float[Array, "*position width"]
) -> Float[Array, " *position"]:
    """In [0, 2]; 1 with zero gradient where either is zero, which has no direction."""
    return 1 - jnp.sum(_direction(a) * _direction(b), axis=-1)


def _direction(x: Float[Array, "*position width"]) -> Float[Array, "*position width"]:
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    some = square > 0
    return x * jnp.where(some, lax.rsqrt(jnp.where(some, square, 1.0)), 0.0)
