"""The loss of one chunk of tokens and its gradient, both from the same logits.

Let g_c = ∂D/∂log q_c over the k + 1 categories of `loss/divergences.py`, and G = Σ_c g_c. For any
divergence D the gradient with respect to the student's logits is
    stored v:  β·(g_v − G·q_v)            tail v:  β·(g_tail·q_v/τ − G·q_v)
with τ the student's mass of the tail. For forward KL g = −p and G = −1, which gives β·(q − p) and
β·q_v·(1 − t/τ). To a tail's gradient, `loss/tail_corrections.py`, `counts.py` and `sketches.py` add
β·(w·q_v/τ − ρ_v). `loss/sorted_probabilities.py` has a gradient of its own, which is added.
`loss/on_policy.py` has no categories: its gradient is a multiple of the label's.

Logits and gradient are those of this device's columns ("here"); see `loss/student_view.py`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decant.models.mesh.vocabulary import Vocabulary
from decant.schemas.targets.unmatched import Partners
from decant.served_losses import BY_RANK, Divergence, Tail
from decant.trainer.loss.counts import (
    correction_from_counts,
    whole_as_tail,
)
from decant.trainer.loss.divergences import (
    TeacherCategories,
    divergence,
    teacher_categories,
    temperature_scale,
)
from decant.trainer.loss.on_policy import policy_terms
from decant.trainer.loss.sketches import (
    SketchTables,
    correction_from_sketch,
    log_shape,
    sketch_logits,
    with_shaped_tail,
)
from decant.trainer.loss.sorted_probabilities import distance_by_rank
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

Tables = TypeVar("Tables")


class HeadSums(NamedTuple):
    """Sums over the counted positions, in nats. Divide by the count of the *whole* batch."""

    kl: Float[Array, ""]
    """Forward KL at T. With tail = "bucket" a lower bound, "sampled" right on average, "prior" an
    estimate, "renormalize" the KL to a teacher without a tail; "counts" and "sketch": see
    `loss/counts.py` and `loss/sketches.py`."""
    ce: Float[Array, ""]
    """Hard-label cross-entropy at T = 1."""
    ce_taught: Float[Array, ""]
    """`ce` over the positions that `taught` counts."""
    agreement: Float[Array, ""]
    """Number of positions whose most likely token is the teacher's, as far as its targets tell."""
    count: Float[Array, ""]
    """Number of counted positions."""
    taught: Float[Array, ""]
    """Number of counted positions with a teacher's targets, to which `kl` and `agreement` refer.
    The others are learned from their label alone, as at α = 0."""
    kl_uncorrected: Float[Array, ""]
    """`kl` without the correction for the tail's shape: with tail = "sampled" the lower bound that
    "bucket" gives, and with "prior" and "sketch" too if the divergence is forward KL."""
    advantage: Float[Array, ""]
    """This and the next two are for "on_policy" (`PolicyTerms`), over the taught positions, and 0
    for others; `kl`, `kl_uncorrected` and `agreement` are 0 for "on_policy"."""
    ratio: Float[Array, ""]
    clipped: Float[Array, ""]

    @classmethod
    def zero(cls) -> HeadSums:
        """Sums over no positions."""
        return cls(*[jnp.float32(0)] * len(cls._fields))


class Recipe(NamedTuple):
    """The static settings of the fused head's loss. T and α are arrays: see `LossInputs`."""

    divergence: Divergence = "forward_kl"
    mix: float = 0.5
    tail: Tail | None = "bucket"
    """Not read for "on_policy"."""
    chunk_tokens: int | None = None
    softcap: float | None = None
    """Cap of the student's logits, `ModelConfig.final_softcap`."""
    frozen_head: bool = False
    """The unembedding is not trained: its gradient is not computed."""
    bound: bool = False
    """With tail = "counts": also give the bound as `kl_uncorrected`, for which the stored head is
    needed. For judging: it makes the gradient wrong."""
    clip: float = 0.2
    anchor: float = 0.0

    @property
    def of_ids(self) -> Divergence:
        """The divergence between the probabilities of the same ids. ULD has none: its forward KL is
        reported, but not learned from."""
        by_rank: dict[Divergence, Divergence] = {"uld": "forward_kl", "gold": "jsd"}
        return by_rank.get(self.divergence, self.divergence)

    @property
    def dense(self) -> bool:
        """Whether every token is a category: the divergence has no shortcut for this tail."""
        shortcut = self.divergence in ("forward_kl", "on_policy")
        return self.tail in ("prior", "sketch") and not shortcut


class LossInputs(NamedTuple):
    """The inputs of the loss that may change between updates."""

    temperature: Float[Array, ""]
    alpha: Float[Array, ""]
    log_prior: Float[Array, " here"] | None = None
    """log π at this temperature, −inf in padding columns; for tail = "prior"."""
    sketch: SketchTables | None = None
    """For tail = "sketch"."""
    partners: Partners | None = None
    """For divergence = "gold"."""


class Slope(NamedTuple):
    """The parts of the gradient, each times the position's factor in the loss."""

    categories: Float[Array, "n categories"]
    """Derivative with respect to each category's log q."""
    correction: TailCorrection | None
    hard: Float[Array, " n"]
    """Factor of the cross-entropy with the label."""
    log_shape: Float[Array, "*n here"] | None = None
    """Log of the tail's shape, which `correction.density` multiplies; without the factor."""
    by_rank: Float[Array, "n here"] | None = None
    """The gradient in the logits that sorted probabilities add."""


def chunk_loss(
    logits: Float[Array, "n here"],
    targets: BatchTargets,
    *,
    recipe: Recipe,
    inputs: LossInputs,
    vocabulary: Vocabulary,
) -> tuple[Float[Array, ""], HeadSums]:
    """The loss summed over a chunk's counted positions, and its parts."""
    inputs = _at_temperature(recipe, inputs)
    view = _view(logits, targets, recipe, inputs, vocabulary)
    settings = {"recipe": recipe, "inputs": inputs, "vocabulary": vocabulary}
    value, sums, _ = _loss(logits, view, targets, **settings)
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
    inputs = _at_temperature(recipe, inputs)
    beta = 1 / inputs.temperature
    view = _view(logits, targets, recipe, inputs, vocabulary)
    settings = {"recipe": recipe, "inputs": inputs, "vocabulary": vocabulary}
    value, sums, slope = _loss(logits, view, targets, **settings)
    if recipe.dense:
        gradient = _dense_gradient(logits, view, slope, beta=beta, vocabulary=vocabulary)
    else:
        gradient = _gradient(view, slope, beta=beta)
        omega = slope.correction and slope.correction.drawn
        omega = None if omega is None else beta * omega
        drawn = targets.count_ids if recipe.tail == "counts" else targets.tail_ids
        gradient = subtract_at_ids(gradient, drawn, omega, vocabulary=vocabulary)
    hard = slope.hard[:, None]
    gradient = subtract_at_ids(gradient, targets.labels[:, None], hard, vocabulary=vocabulary)
    if slope.by_rank is not None:
        gradient += slope.by_rank
    return value, sums, gradient


def _at_temperature(recipe: Recipe, inputs: LossInputs) -> LossInputs:
    """The inputs with a T that the compiler knows if the loss allows no other: it saves an exp."""
    only_one = recipe.tail == "counts" or recipe.divergence == "on_policy"
    return inputs._replace(temperature=jnp.float32(1)) if only_one else inputs


def _has_head(recipe: Recipe, targets: BatchTargets) -> bool:
    if recipe.divergence == "on_policy":
        return False
    if recipe.tail != "counts":
        return True
    return recipe.bound and targets.topk_ids.shape[-1] > 0


def _view(
    logits: Float[Array, "n here"],
    targets: BatchTargets,
    recipe: Recipe,
    inputs: LossInputs,
    vocabulary: Vocabulary,
) -> StudentView:
    return summarise_logits(
        logits,
        targets,
        beta=1 / inputs.temperature,
        vocabulary=vocabulary,
        log_prior=inputs.log_prior,
        has_head=_has_head(recipe, targets),
    )


def _loss(
    logits: Float[Array, "n here"],
    view: StudentView,
    targets: BatchTargets,
    *,
    recipe: Recipe,
    inputs: LossInputs,
    vocabulary: Vocabulary,
) -> tuple[Float[Array, ""], HeadSums, Slope]:
    """The summed loss, its parts, and the parts of its gradient."""
    if recipe.divergence == "on_policy":
        return _on_policy_loss(view, targets, recipe=recipe, alpha=inputs.alpha)
    logp, logq, correction, shape = _categories(
        view, targets, recipe=recipe, inputs=inputs, vocabulary=vocabulary
    )

    def divergence_of(kind: Divergence, logq: Array) -> Array:
        return divergence(logp, logq, kind=kind, mix=recipe.mix)

    # If every token is a category, each device holds its own; a divergence is a sum over them.
    total = vocabulary.sum_over_devices if recipe.dense else lambda x: x
    soft, pull = jax.vjp(lambda logq: divergence_of(recipe.of_ids, logq), logq)
    soft = total(soft)
    forward = recipe.of_ids == "forward_kl"
    kl = uncorrected = soft if forward else total(divergence_of("forward_kl", logq))
    if correction is not None:
        soft += correction.value
        kl = soft if forward else kl
    ce = view.z_hard - view.label
    highest = jnp.maximum(view.highest, jnp.max(view.head, axis=-1, initial=-jnp.inf))
    taught = targets.taught
    agrees = taught & (view.teachers >= highest)
    counted = targets.mask.astype(jnp.float32)
    sums = HeadSums(
        kl=jnp.sum(counted * kl),
        ce=jnp.sum(counted * ce),
        ce_taught=jnp.sum(jnp.where(taught, ce, 0.0)),
        agreement=jnp.sum(counted * agrees),
        count=jnp.sum(counted),
        taught=jnp.sum(taught.astype(jnp.float32)),
        kl_uncorrected=jnp.sum(counted * uncorrected),
        advantage=jnp.float32(0),
        ratio=jnp.float32(0),
        clipped=jnp.float32(0),
    )
    alpha = jnp.where(taught, inputs.alpha, 0.0)
    factor = alpha * temperature_scale(inputs.temperature, kind=recipe.of_ids)
    others, by_rank = (1 - alpha) * ce, None
    if recipe.divergence in BY_RANK:
        share, distance = distance_by_rank(
            logits,
            view.z_soft,
            targets,
            temperature=inputs.temperature,
            vocabulary=vocabulary,
            partners=inputs.partners if recipe.divergence == "gold" else None,
        )
        of_ranks = alpha * share * temperature_scale(inputs.temperature, kind="uld")
        factor = factor * (1 - share)
        by_rank = (counted * of_ranks)[:, None] * distance.gradient
        others += of_ranks * distance.value
    (categories,) = pull(counted * factor)
    scaled = correction and correction.scaled(counted * factor)
    slope = Slope(categories, scaled, counted * (1 - alpha), shape, by_rank)
    return jnp.sum(counted * (factor * soft + others)), sums, slope


def _on_policy_loss(
    view: StudentView, targets: BatchTargets, *, recipe: Recipe, alpha: Float[Array, ""]
) -> tuple[Float[Array, ""], HeadSums, Slope]:
    """As `_loss`, for "on_policy": written tokens have its terms, all others their cross-entropy.

    Nothing is learned from a written token that the teacher gave no probability.
    """
    assert targets.label_logprobs is not None
    assert targets.writer_logprobs is not None
    ce = view.z_hard - view.label
    taught = targets.taught
    # The double where: NaN and −inf at other positions must not reach the sums.
    terms = policy_terms(
        -ce,
        jnp.where(taught, targets.label_logprobs, -ce),
        jnp.where(taught, targets.writer_logprobs, -ce),
        clip=recipe.clip,
        anchor=recipe.anchor,
    )
    counted, scored = (x.astype(jnp.float32) for x in (targets.mask, taught))
    soft = alpha * scored
    hard = (1 - alpha) * scored + counted * ~targets.written
    zero = jnp.float32(0)
    sums = HeadSums(
        kl=zero,
        ce=jnp.sum(counted * ce),
        ce_taught=jnp.sum(scored * ce),
        agreement=zero,
        count=jnp.sum(counted),
        taught=jnp.sum(scored),
        kl_uncorrected=zero,
        advantage=jnp.sum(scored * terms.advantage),
        ratio=jnp.sum(scored * terms.ratio),
        clipped=jnp.sum(scored * terms.clipped),
    )
    no_categories = jnp.zeros((len(ce), 1), jnp.float32)
    slope = Slope(no_categories, None, soft * terms.weight + hard)
    return jnp.sum(soft * terms.value + hard * ce), sums, slope


def _categories(
    view: StudentView,
    targets: BatchTargets,
    *,
    recipe: Recipe,
    inputs: LossInputs,
    vocabulary: Vocabulary,
) -> tuple[Array, Array, TailCorrection | None, Array | None]:
    """log p and log q over the categories [n, categories]; the correction for the tail's shape and
    the log of that shape, if any."""
    assert recipe.tail is not None
    beta = 1 / inputs.temperature
    taught = targets.taught[:, None]
    shape = correction = None
    if _has_head(recipe, targets):
        teacher = teacher_categories(
            jnp.where(targets.stored, targets.topk_logprobs, -jnp.inf),
            jnp.where(taught, targets.tail_logmass, -jnp.inf),
            beta=beta,
            tail=recipe.tail,
        )
    else:
        teacher = whole_as_tail(view, targets)
    logp = teacher.logp
    logq = jnp.concatenate([beta * view.head, view.tail_soft[:, None]], axis=-1)
    if recipe.dense:
        logp = _dense_logp(view, targets, teacher, inputs=inputs, vocabulary=vocabulary)
        logq = set_columns(beta * view.tail, view.columns, beta * view.head)
    elif recipe.tail == "sampled":
        correction = correction_from_draws(view, targets, teacher, beta=beta)
    elif recipe.tail == "counts":
        correction = correction_from_counts(view, targets)
    elif recipe.tail == "prior":
        shape = _required(inputs.log_prior, tail="prior")
        correction = correction_from_prior(view, teacher, shape, beta=beta, vocabulary=vocabulary)
    elif recipe.tail == "sketch":
        tables = _required(inputs.sketch, tail="sketch")
        logits = sketch_logits(targets, tables, vocabulary=vocabulary)
        shape, cross = log_shape(logits, view, beta=beta, vocabulary=vocabulary)
        correction = correction_from_sketch(view, teacher, cross)
    logq = jnp.where(taught, logq - view.z_soft[:, None], -jnp.inf)
    if recipe.tail == "counts" and recipe.bound and correction is not None:
        own = correction.value - divergence(logp, logq, kind="forward_kl")
        correction = correction._replace(value=own)
    return logp, logq, correction, shape


def _dense_logp(
    view: StudentView,
    targets: BatchTargets,
    teacher: TeacherCategories,
    *,
    inputs: LossInputs,
    vocabulary: Vocabulary,
) -> Float[Array, "n here"]:
    """log p of every token of this device, with a tail from sketches or else from the prior."""
    if inputs.sketch is None:
        prior = _required(inputs.log_prior, tail="prior")
        return dense_teacher_logp(view, teacher, prior, vocabulary=vocabulary)
    logits = sketch_logits(targets, inputs.sketch, vocabulary=vocabulary)
    shape, _ = log_shape(logits, view, beta=1 / inputs.temperature, vocabulary=vocabulary)
    return with_shaped_tail(view, teacher, shape)


def _required(tables: Tables | None, *, tail: Tail) -> Tables:
    """The tables that this tail needs. ValueError if the caller gave none."""
    if tables is None:
        raise ValueError(f'tail = "{tail}" needs its tables, which are None')
    return tables


def _gradient(
    view: StudentView,
    slope: Slope,
    *,
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
        and slope.log_shape is not None
    ):
        in_tail -= beta * slope.correction.density[:, None] * jnp.exp(slope.log_shape)
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
