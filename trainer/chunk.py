"""One chunk of tokens: logits → loss and, from the same logits, its gradient.

With g_c = ∂D/∂log q_c over the k + 1 categories of `trainer.losses` and G = Σ_c g_c, the
gradient with respect to the student's logits is
    stored v:  β·(g_v − G·q_v)            tail v:  β·(g_tail·q_v/τ − G·q_v)
whatever the divergence D. For forward KL g = −p and G = −1, which gives β·(q − p) and
β·q_v·(1 − t/τ). To the tail's, `trainer.tails` adds β·(w·q_v/τ − ρ_v).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from trainer.losses import Divergence, Tail, divergence, teacher_categories, temperature_scale
from trainer.tails import Inside, prior, sampled, spread_prior
from trainer.view import StudentView, Targets, put, stored, take_apart


class Sums(NamedTuple):
    """Sums over the counted positions, in nats; divide by the count of the *whole* batch."""

    kl: Float[Array, ""]
    """Forward KL at T, the teacher's entropy subtracted. By `tail`: `bucket`, a lower bound;
    `sampled`, right on average; `prior`, an estimate; `renormalize`, that of another teacher."""
    ce: Float[Array, ""]
    """Hard-label cross-entropy at T = 1."""
    agreement: Float[Array, ""]
    """Positions whose most likely token is the teacher's; not one whose teacher's is not stored."""
    count: Float[Array, ""]


class Recipe(NamedTuple):
    """The part of the loss that is compiled in; temperature and α stay numbers."""

    divergence: Divergence = "forward_kl"
    mix: float = 0.5
    tail: Tail = "bucket"
    chunk_tokens: int = 256
    softcap: float | None = None
    """Of the student's logits: its `config.final_softcap`."""

    @property
    def dense(self) -> bool:
        """Whether every token is a category: the divergence has no shortcut for this tail."""
        return self.tail == "prior" and self.divergence != "forward_kl"


class Weights(NamedTuple):
    """The part of the loss that may change while training."""

    temperature: Float[Array, ""]
    alpha: Float[Array, ""]
    log_prior: Float[Array, " vocab"] | None = None
    """log π at this temperature; for tail = "prior"."""


class Slope(NamedTuple):
    """What the gradient is made of, times each position's weight."""

    categories: Float[Array, "n categories"]
    """In each category's log q."""
    inside: Inside | None
    hard: Float[Array, " n"]
    """Weight of the hard label."""


def chunk_loss(
    logits: Float[Array, "n vocab"], targets: Targets, *, recipe: Recipe, weights: Weights
) -> tuple[Float[Array, ""], Sums]:
    """The loss summed over a chunk, and its parts."""
    view = _view(logits, targets, weights)
    value, sums, _ = _loss(view, targets, recipe=recipe, weights=weights)
    return value, sums


def chunk_loss_and_gradient(
    logits: Float[Array, "n vocab"], targets: Targets, *, recipe: Recipe, weights: Weights
) -> tuple[Float[Array, ""], Sums, Float[Array, "n vocab"]]:
    """The loss summed over a chunk, its parts, and its gradient with respect to the logits."""
    beta = 1 / weights.temperature
    view = _view(logits, targets, weights)
    value, sums, slope = _loss(view, targets, recipe=recipe, weights=weights)
    if recipe.dense:
        gradient = _dense_gradient(logits, view, slope, beta=beta)
    else:
        gradient = _gradient(view, slope, log_prior=weights.log_prior, beta=beta)
        gradient = _minus(gradient, targets.tail_ids, slope.inside and slope.inside.drawn, beta)
    return value, sums, _minus(gradient, targets.labels[:, None], slope.hard[:, None])


def _view(logits: Float[Array, "n vocab"], targets: Targets, weights: Weights) -> StudentView:
    beta = 1 / weights.temperature
    return take_apart(logits, targets, beta=beta, log_prior=weights.log_prior)


def _loss(
    view: StudentView, targets: Targets, *, recipe: Recipe, weights: Weights
) -> tuple[Float[Array, ""], Sums, Slope]:
    """The loss sum, its parts, and its slope."""
    logp, logq, inside = _sides(view, targets, recipe=recipe, weights=weights)
    soft, pull = jax.vjp(
        lambda logq: divergence(logp, logq, kind=recipe.divergence, mix=recipe.mix), logq
    )
    if inside is not None:
        soft += inside.value
    forward = recipe.divergence == "forward_kl"
    kl = soft if forward else divergence(logp, logq, kind="forward_kl")
    ce = view.z_hard - view.label
    highest = jnp.maximum(jnp.max(view.tail, axis=-1), jnp.max(view.head, axis=-1))
    agrees = jnp.isfinite(view.head[:, 0]) & (view.head[:, 0] >= highest)
    counted = targets.mask.astype(jnp.float32)
    sums = Sums(
        kl=jnp.sum(counted * kl),
        ce=jnp.sum(counted * ce),
        agreement=jnp.sum(counted * agrees),
        count=jnp.sum(counted),
    )
    alpha = weights.alpha
    factor = alpha * temperature_scale(weights.temperature, kind=recipe.divergence)
    (categories,) = pull(counted * factor)
    slope = Slope(categories, inside and inside.scaled(counted * factor), counted * (1 - alpha))
    return jnp.sum(counted * (factor * soft + (1 - alpha) * ce)), sums, slope


def _sides(
    view: StudentView, targets: Targets, *, recipe: Recipe, weights: Weights
) -> tuple[Float[Array, "n categories"], Float[Array, "n categories"], Inside | None]:
    """log p and log q over the categories, and what is known of the tail's inside besides."""
    beta = 1 / weights.temperature
    scored = targets.mask[:, None]
    teacher = teacher_categories(
        jnp.where(stored(targets), targets.topk_logprobs, -jnp.inf),
        jnp.where(scored, targets.tail_logmass, -jnp.inf),
        beta=beta,
        tail=recipe.tail,
    )
    logp, inside = teacher.logp, None
    logq = jnp.concatenate([beta * view.head, view.tail_soft[:, None]], axis=-1)
    if recipe.tail == "sampled":
        inside = sampled(view, targets, teacher, beta=beta)
    elif recipe.tail == "prior":
        if weights.log_prior is None:
            raise ValueError('tail = "prior" needs a prior: none was given')
        if recipe.dense:
            logp = spread_prior(view, teacher, weights.log_prior)
            logq = put(beta * view.tail, view.columns, beta * view.head)
        else:
            inside = prior(view, teacher, weights.log_prior, beta=beta)
    return logp, jnp.where(scored, logq - view.z_soft[:, None], -jnp.inf), inside


def _gradient(
    view: StudentView,
    slope: Slope,
    *,
    log_prior: Float[Array, " vocab"] | None,
    beta: Float[Array, ""],
) -> Float[Array, "n vocab"]:
    """The gradient in the logits, but for what labels and draws take away."""
    categories = beta * slope.categories
    total = jnp.sum(categories, axis=-1)
    of_tail = categories[:, -1]
    if slope.inside is not None:
        of_tail += beta * slope.inside.mass
    # q_v/τ = exp(β·logit − tail_soft) in the tail; an empty tail has no v, but must not be NaN.
    share = jnp.where(jnp.isfinite(view.tail_soft), jnp.exp(beta * view.top - view.tail_soft), 0.0)
    of_soft = of_tail * share - total * jnp.exp(beta * view.top - view.z_soft)
    of_hard = slope.hard * jnp.exp(view.top - view.z_hard)
    below = view.tail - view.top[:, None]
    in_tail = of_soft[:, None] * jnp.exp(beta * below) + of_hard[:, None] * jnp.exp(below)
    if slope.inside is not None and slope.inside.density is not None and log_prior is not None:
        in_tail -= beta * slope.inside.density[:, None] * jnp.exp(log_prior)
    q_head = jnp.exp(beta * view.head - view.z_soft[:, None])
    in_head = categories[:, :-1] - total[:, None] * q_head
    in_head += slope.hard[:, None] * jnp.exp(view.head - view.z_hard[:, None])
    return put(in_tail, view.columns, in_head)


def _dense_gradient(
    logits: Float[Array, "n vocab"], view: StudentView, slope: Slope, *, beta: Float[Array, ""]
) -> Float[Array, "n vocab"]:
    """The same where every token is a category."""
    total = jnp.sum(slope.categories, axis=-1, keepdims=True)
    soft = slope.categories - total * jnp.exp(beta * logits - view.z_soft[:, None])
    return beta * soft + slope.hard[:, None] * jnp.exp(logits - view.z_hard[:, None])


def _minus(
    gradient: Float[Array, "n vocab"],
    ids: Int[Array, "n some"] | None,
    values: Float[Array, "n some"] | None,
    factor: Float[Array, ""] | float = 1.0,
) -> Float[Array, "n vocab"]:
    """Take values away at ids, which may repeat."""
    if ids is None or values is None:
        return gradient
    return gradient.at[jnp.arange(len(ids))[:, None], ids].add(-factor * values)
