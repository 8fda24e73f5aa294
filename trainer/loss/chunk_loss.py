"""The loss of one chunk of tokens and its gradient, both from the same logits.

Let g_c = ∂D/∂log q_c over the k + 1 categories of `loss/divergences.py`, and G = Σ_c g_c. For any
divergence D the gradient with respect to the student's logits is
    stored v:  β·(g_v − G·q_v)            tail v:  β·(g_tail·q_v/τ − G·q_v)
with τ the student's mass of the tail. For forward KL g = −p and G = −1, which gives β·(q − p) and
β·q_v·(1 − t/τ). `loss/tail_corrections.py` adds β·(w·q_v/τ − ρ_v) to the gradient of the tail.

Logits and gradient are those of this device's columns ("here"); see `loss/student_view.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decant.models.mesh.vocabulary import Vocabulary
from decant.trainer.loss.divergences import (
    divergence,
    teacher_categories,
    temperature_scale,
)
from decant.trainer.loss.settings import Divergence, Tail
from decant.trainer.loss.student_view import (
    StudentView,
    set_columns,
    subtract_at_ids,
    summarise_logits,
)
from decant.trainer.loss.tail_corrections import (
    TailCorrection,
    correction_from_draws,
    correction_from_prior,
    dense_teacher_logp,
)
from decant.trainer.loss.targets import BatchTargets


class HeadSums(NamedTuple):
    """Sums over the counted positions, in nats. Divide by the count of the *whole* batch."""

    kl: Float[Array, ""]
    """Forward KL at T. With tail = "bucket" a lower bound, "sampled" right on average, "prior" an
    estimate, "renormalize" the KL to a teacher without a tail."""
    ce: Float[Array, ""]
    """Hard-label cross-entropy at T = 1."""
    agreement: Float[Array, ""]
    """Number of positions whose most likely token is the teacher's, which must be stored."""
    count: Float[Array, ""]
    """Number of counted positions."""
    taught: Float[Array, ""]
    """Number of counted positions with a teacher's targets, to which `kl` and `agreement` refer.
    The others are learned from their label alone, as at α = 0."""
    kl_uncorrected: Float[Array, ""]
    """`kl` without the correction for the tail's shape: with tail = "sampled" the lower bound that
    "bucket" gives, and with "prior" too if the divergence is forward KL."""

    @classmethod
    def zero(cls) -> HeadSums:
        """Sums over no positions."""
        return cls(*[jnp.float32(0)] * len(cls._fields))


class Recipe(NamedTuple):
    """The static settings of the fused head's loss. T and α are arrays: see `LossInputs`."""

    divergence: Divergence = "forward_kl"
    mix: float = 0.5
    tail: Tail = "bucket"
    chunk_tokens: int | None = None
    softcap: float | None = None
    """Cap of the student's logits, `ModelConfig.final_softcap`."""

    @property
    def dense(self) -> bool:
        """Whether every token is a category: the divergence has no shortcut for this tail."""
        return self.tail == "prior" and self.divergence != "forward_kl"


class LossInputs(NamedTuple):
    """The inputs of the loss that may change between updates."""

    temperature: Float[Array, ""]
    alpha: Float[Array, ""]
    log_prior: Float[Array, " here"] | None = None
    """log π at this temperature, −inf in padding columns; for tail = "prior"."""


class Slope(NamedTuple):
    """The parts of the gradient, each times the position's factor in the loss."""

    categories: Float[Array, "n categories"]
    """Derivative with respect to each category's log q."""
    correction: TailCorrection | None
    hard: Float[Array, " n"]
    """Factor of the cross-entropy with the label."""


def chunk_loss(
    logits: Float[Array, "n here"],
    targets: BatchTargets,
    *,
    recipe: Recipe,
    inputs: LossInputs,
    vocabulary: Vocabulary,
) -> tuple[Float[Array, ""], HeadSums]:
    """The loss summed over a chunk's counted positions, and its parts."""
    view = _view(logits, targets, inputs, vocabulary)
    value, sums, _ = _loss(view, targets, recipe=recipe, inputs=inputs, vocabulary=vocabulary)
    return value, sums


def chunk_loss_and_gradient(
    logits: Float[Array, "n here"],
    targets: BatchTargets,
    *,
    recipe: Recipe,
    inputs: LossInputs,
    vocabulary: Vocabulary,
) -> tuple[Float[Array, ""], HeadSums, Float[Array, "n here"]]:
    """The loss summed over a chunk's counted positions, its parts, and its gradient with respect to
    the logits."""
    beta = 1 / inputs.temperature
    view = _view(logits, targets, inputs, vocabulary)
    value, sums, slope = _loss(view, targets, recipe=recipe, inputs=inputs, vocabulary=vocabulary)
    if recipe.dense:
        gradient = _dense_gradient(logits, view, slope, beta=beta, vocabulary=vocabulary)
    else:
        gradient = _gradient(view, slope, log_prior=inputs.log_prior, beta=beta)
        omega = slope.correction and slope.correction.drawn
        omega = None if omega is None else beta * omega
        gradient = subtract_at_ids(gradient, targets.tail_ids, omega, vocabulary=vocabulary)
    hard = slope.hard[:, None]
    gradient = subtract_at_ids(gradient, targets.labels[:, None], hard, vocabulary=vocabulary)
    return value, sums, gradient


def _view(
    logits: Float[Array, "n here"],
    targets: BatchTargets,
    inputs: LossInputs,
    vocabulary: Vocabulary,
) -> StudentView:
    return summarise_logits(
        logits,
        targets,
        beta=1 / inputs.temperature,
        vocabulary=vocabulary,
        log_prior=inputs.log_prior,
    )


def _loss(
    view: StudentView,
    targets: BatchTargets,
    *,
    recipe: Recipe,
    inputs: LossInputs,
    vocabulary: Vocabulary,
) -> tuple[Float[Array, ""], HeadSums, Slope]:
    """The summed loss, its parts, and the parts of its gradient."""
    logp, logq, correction = _categories(
        view, targets, recipe=recipe, inputs=inputs, vocabulary=vocabulary
    )

    def divergence_of(kind: Divergence, logq: Array) -> Array:
        return divergence(logp, logq, kind=kind, mix=recipe.mix)

    # If every token is a category, each device holds its own; a divergence is a sum over them.
    total = vocabulary.sum_over_devices if recipe.dense else lambda x: x
    soft, pull = jax.vjp(lambda logq: divergence_of(recipe.divergence, logq), logq)
    soft = total(soft)
    forward = recipe.divergence == "forward_kl"
    kl = uncorrected = soft if forward else total(divergence_of("forward_kl", logq))
    if correction is not None:
        soft += correction.value
        kl = soft if forward else kl
    ce = view.z_hard - view.label
    highest = jnp.maximum(view.highest, jnp.max(view.head, axis=-1))
    agrees = jnp.isfinite(view.head[:, 0]) & (view.head[:, 0] >= highest)
    taught = jnp.any(targets.stored, axis=-1)
    counted = targets.mask.astype(jnp.float32)
    sums = HeadSums(
        kl=jnp.sum(counted * kl),
        ce=jnp.sum(counted * ce),
        agreement=jnp.sum(counted * agrees),
        count=jnp.sum(counted),
        taught=jnp.sum(taught.astype(jnp.float32)),
        kl_uncorrected=jnp.sum(counted * uncorrected),
    )
    alpha = jnp.where(taught, inputs.alpha, 0.0)
    factor = alpha * temperature_scale(inputs.temperature, kind=recipe.divergence)
    (categories,) = pull(counted * factor)
    scaled = correction and correction.scaled(counted * factor)
    slope = Slope(categories, scaled, counted * (1 - alpha))
    return jnp.sum(counted * (factor * soft + (1 - alpha) * ce)), sums, slope


def _categories(
    view: StudentView,
    targets: BatchTargets,
    *,
    recipe: Recipe,
    inputs: LossInputs,
    vocabulary: Vocabulary,
) -> tuple[Float[Array, "n categories"], Float[Array, "n categories"], TailCorrection | None]:
    """log p and log q over the categories, and the correction for the tail's shape, if any."""
    beta = 1 / inputs.temperature
    kept = targets.stored
    scored = jnp.any(kept, axis=-1, keepdims=True)
    teacher = teacher_categories(
        jnp.where(kept, targets.topk_logprobs, -jnp.inf),
        jnp.where(scored, targets.tail_logmass, -jnp.inf),
        beta=beta,
        tail=recipe.tail,
    )
    logp, correction = teacher.logp, None
    logq = jnp.concatenate([beta * view.head, view.tail_soft[:, None]], axis=-1)
    if recipe.tail == "sampled":
        correction = correction_from_draws(view, targets, teacher, beta=beta)
    elif recipe.tail == "prior":
        if inputs.log_prior is None:
            raise ValueError('tail = "prior" needs a prior: log_prior is None')
        if recipe.dense:
            logp = dense_teacher_logp(view, teacher, inputs.log_prior, vocabulary=vocabulary)
            logq = set_columns(beta * view.tail, view.columns, beta * view.head)
        else:
            correction = correction_from_prior(
                view, teacher, inputs.log_prior, beta=beta, vocabulary=vocabulary
            )
    return logp, jnp.where(scored, logq - view.z_soft[:, None], -jnp.inf), correction


def _gradient(
    view: StudentView,
    slope: Slope,
    *,
    log_prior: Float[Array, " here"] | None,
    beta: Float[Array, ""],
) -> Float[Array, "n here"]:
    """The gradient in the logits, before the terms at labels and tail draws are subtracted."""
    categories = beta * slope.categories
    total = jnp.sum(categories, axis=-1)
    of_tail = categories[:, -1]
    if slope.correction is not None:
        of_tail += beta * slope.correction.mass
    # q_v/τ = exp(β·logit − tail_soft) in the tail. An empty tail has τ = 0: avoid NaN.
    share = jnp.where(jnp.isfinite(view.tail_soft), jnp.exp(beta * view.top - view.tail_soft), 0.0)
    of_soft = of_tail * share - total * jnp.exp(beta * view.top - view.z_soft)
    of_hard = slope.hard * jnp.exp(view.top - view.z_hard)
    below = view.tail - view.top[:, None]
    in_tail = of_soft[:, None] * jnp.exp(beta * below) + of_hard[:, None] * jnp.exp(below)
    if (
        slope.correction is not None
        and slope.correction.density is not None
        and log_prior is not None
    ):
        in_tail -= beta * slope.correction.density[:, None] * jnp.exp(log_prior)
    q_head = jnp.exp(beta * view.head - view.z_soft[:, None])
    in_head = categories[:, :-1] - total[:, None] * q_head
    in_head += slope.hard[:, None] * jnp.exp(view.head - view.z_hard[:, None])
    return set_columns(in_tail, view.columns, in_head)


def _dense_gradient(
    logits: Float[Array, "n here"],
    view: StudentView,
    slope: Slope,
    *,
    beta: Float[Array, ""],
    vocabulary: Vocabulary,
) -> Float[Array, "n here"]:
    """The same gradient if every token is a category."""
    total = vocabulary.sum_over_devices(jnp.sum(slope.categories, axis=-1))
    soft = slope.categories - total[:, None] * jnp.exp(beta * logits - view.z_soft[:, None])
    return beta * soft + slope.hard[:, None] * jnp.exp(logits - view.z_hard[:, None])
