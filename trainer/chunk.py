"""One chunk of tokens: logits → loss and, from the same logits, its gradient.

With g_c = ∂D/∂log q_c over the k + 1 categories of `trainer.losses` and G = Σ_c g_c, the
gradient with respect to the student's logits is
    stored v:  β·(g_v − G·q_v)            tail v:  β·(g_tail·q_v/τ − G·q_v)
whatever the divergence D. For forward KL g = −p and G = −1, which gives β·(q − p) and
β·q_v·(1 − t/τ).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from trainer.losses import Divergence, Tail, divergence, teacher_categories, temperature_scale


class Targets(NamedTuple):
    """What positions are scored against; the label of position t is the token at t + 1."""

    labels: Int[Array, "*position"]
    mask: Bool[Array, "*position"]
    topk_ids: Int[Array, "*position k"]
    topk_logprobs: Float[Array, "*position k"]
    tail_logmass: Float[Array, "*position nodes"]


class Sums(NamedTuple):
    """Sums over the counted positions, in nats; divide by the count of the *whole* batch."""

    kl: Float[Array, ""]
    """Forward KL at T over the k + 1 categories, the teacher's entropy subtracted."""
    ce: Float[Array, ""]
    """Hard-label cross-entropy at T = 1."""
    agreement: Float[Array, ""]
    """Positions whose most likely token is the teacher's."""
    count: Float[Array, ""]


class Recipe(NamedTuple):
    """The part of the loss that is compiled in; temperature and α stay numbers."""

    divergence: Divergence = "forward_kl"
    mix: float = 0.5
    tail: Tail = "bucket"
    chunk_tokens: int = 256


class Weights(NamedTuple):
    """The part of the loss that may change while training."""

    temperature: Float[Array, ""]
    alpha: Float[Array, ""]


class StudentView(NamedTuple):
    """The student's logits of n tokens, taken apart once into the stored columns and the tail."""

    columns: Int[Array, "n k"]
    """Where to scatter the stored columns; outside the vocabulary where nothing is stored."""
    head: Float[Array, "n k"]
    """Logits of the stored columns, −inf where nothing is stored."""
    label: Float[Array, " n"]
    tail: Float[Array, "n vocab"]
    """All logits with the stored columns at −inf: masked, because 1 − Σ cancels to nothing."""
    top: Float[Array, " n"]
    """The tail's maximum, that nothing underflows however small its share; 0 if it is empty."""
    tail_hard: Float[Array, " n"]
    """log Σ_tail exp(logit)."""
    tail_soft: Float[Array, " n"]
    """log Σ_tail exp(β·logit)."""
    z_hard: Float[Array, " n"]
    """log Σ exp(logit) over the vocabulary."""
    z_soft: Float[Array, " n"]
    """log Σ exp(β·logit) over the vocabulary."""


def chunk_loss(
    logits: Float[Array, "n vocab"], targets: Targets, *, recipe: Recipe, weights: Weights
) -> tuple[Float[Array, ""], Sums]:
    """The loss summed over a chunk, and its parts."""
    view = take_apart(logits, targets, beta=1 / weights.temperature)
    value, sums, _ = _loss(view, targets, recipe=recipe, weights=weights)
    return value, sums


def chunk_loss_and_gradient(
    logits: Float[Array, "n vocab"], targets: Targets, *, recipe: Recipe, weights: Weights
) -> tuple[Float[Array, ""], Sums, Float[Array, "n vocab"]]:
    """The loss summed over a chunk, its parts, and its gradient with respect to the logits."""
    view = take_apart(logits, targets, beta=1 / weights.temperature)
    value, sums, slope = _loss(view, targets, recipe=recipe, weights=weights)
    hard = targets.mask * (1 - weights.alpha)
    gradient = _gradient(view, slope, hard, targets.labels, beta=1 / weights.temperature)
    return value, sums, gradient


def take_apart(
    logits: Float[Array, "n vocab"], targets: Targets, *, beta: Float[Array, ""]
) -> StudentView:
    """Gather the stored columns and reduce the rest, each pass over the logits once."""
    stored = _stored(targets)
    # An index outside for what is not stored, each another one: scatters drop those.
    outside = logits.shape[-1] + jnp.arange(stored.shape[-1])
    columns = jnp.where(stored, targets.topk_ids, outside)
    head = jnp.where(stored, jnp.take_along_axis(logits, targets.topk_ids, axis=-1), -jnp.inf)
    label = jnp.take_along_axis(logits, targets.labels[:, None], axis=-1)[:, 0]
    tail = _put(logits, columns, -jnp.inf)
    highest = jnp.max(tail, axis=-1)
    top = jnp.where(jnp.isfinite(highest), highest, 0.0)
    below = tail - top[:, None]
    tail_hard = top + jnp.log(jnp.sum(jnp.exp(below), axis=-1))
    tail_soft = beta * top + jnp.log(jnp.sum(jnp.exp(beta * below), axis=-1))
    return StudentView(
        columns=columns,
        head=head,
        label=label,
        tail=tail,
        top=top,
        tail_hard=tail_hard,
        tail_soft=tail_soft,
        z_hard=jnp.logaddexp(tail_hard, jax.nn.logsumexp(head, axis=-1)),
        z_soft=jnp.logaddexp(tail_soft, jax.nn.logsumexp(beta * head, axis=-1)),
    )


def _loss(
    view: StudentView, targets: Targets, *, recipe: Recipe, weights: Weights
) -> tuple[Float[Array, ""], Sums, Float[Array, "n categories"]]:
    """The loss sum, its parts, and its slope in each category's log q."""
    temperature, alpha = weights
    beta = 1 / temperature
    scored = targets.mask[:, None]
    logp = teacher_categories(
        jnp.where(_stored(targets), targets.topk_logprobs, -jnp.inf),
        jnp.where(scored, targets.tail_logmass, -jnp.inf),
        beta=beta,
        tail=recipe.tail,
    )
    logq = jnp.concatenate([beta * view.head, view.tail_soft[:, None]], axis=-1)
    logq = jnp.where(scored, logq - view.z_soft[:, None], -jnp.inf)
    soft, pull = jax.vjp(
        lambda logq: divergence(logp, logq, kind=recipe.divergence, mix=recipe.mix), logq
    )
    counted = targets.mask.astype(jnp.float32)
    factor = alpha * temperature_scale(temperature, kind=recipe.divergence)
    ce = view.z_hard - view.label
    kl = soft if recipe.divergence == "forward_kl" else divergence(logp, logq, kind="forward_kl")
    highest = jnp.maximum(jnp.max(view.tail, axis=-1), jnp.max(view.head, axis=-1))
    agrees = jnp.isfinite(view.head[:, 0]) & (view.head[:, 0] >= highest)
    sums = Sums(
        kl=jnp.sum(counted * kl),
        ce=jnp.sum(counted * ce),
        agreement=jnp.sum(counted * agrees),
        count=jnp.sum(counted),
    )
    (slope,) = pull(counted * factor)
    return jnp.sum(counted * (factor * soft + (1 - alpha) * ce)), sums, slope


def _gradient(
    view: StudentView,
    slope: Float[Array, "n categories"],
    hard: Float[Array, " n"],
    labels: Int[Array, " n"],
    *,
    beta: Float[Array, ""],
) -> Float[Array, "n vocab"]:
    """The gradient in the logits from the slopes in log q and the weight of the hard label."""
    slope = beta * slope
    total = jnp.sum(slope, axis=-1)
    # q_v/τ = exp(β·logit − tail_soft) in the tail; an empty tail has no v, but must not be NaN.
    share = jnp.where(jnp.isfinite(view.tail_soft), jnp.exp(beta * view.top - view.tail_soft), 0.0)
    of_soft = slope[:, -1] * share - total * jnp.exp(beta * view.top - view.z_soft)
    of_hard = hard * jnp.exp(view.top - view.z_hard)
    below = view.tail - view.top[:, None]
    in_tail = of_soft[:, None] * jnp.exp(beta * below) + of_hard[:, None] * jnp.exp(below)
    q_head = jnp.exp(beta * view.head - view.z_soft[:, None])
    in_head = slope[:, :-1] - total[:, None] * q_head
    in_head += hard[:, None] * jnp.exp(view.head - view.z_hard[:, None])
    gradient = _put(in_tail, view.columns, in_head)
    return gradient.at[jnp.arange(len(labels)), labels].add(-hard)


def _stored(targets: Targets) -> Bool[Array, "n k"]:
    # Not where a position is not scored: padding repeats id 0, and scatters promise unique ids.
    return jnp.isfinite(targets.topk_logprobs) & targets.mask[:, None]


def _put(
    x: Float[Array, "n vocab"],
    columns: Int[Array, "n k"],
    values: Float[Array, "n k"] | float,
) -> Float[Array, "n vocab"]:
    rows = jnp.arange(len(x))[:, None]
    return x.at[rows, columns].set(values, mode="drop", unique_indices=True)
