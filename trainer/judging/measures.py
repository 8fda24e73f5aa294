"""Measures of a student at each position, against the teacher's targets from a cache.

Positions are computed in chunks, as in training, so that logits of a whole batch never exist. All
measures are at T = 1, except those `…_at_temperature`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from decant.models.mesh.vocabulary import Vocabulary
from decant.models.numerics import logits as logits_of
from decant.trainer.loss.batch_fields import Batch
from decant.trainer.loss.counts import correction_from_counts, whole_as_tail
from decant.trainer.loss.divergences import (
    TeacherCategories,
    divergence,
    teacher_categories,
)
from decant.trainer.loss.objective import Objective
from decant.trainer.loss.position_chunks import (
    cut_positions,
    flatten_rows,
    join_positions,
    positions_at_once,
)
from decant.trainer.loss.projections import Parameters
from decant.trainer.loss.sketches import (
    SketchTables,
    correction_from_sketch,
    log_shape,
    sketch_logits,
)
from decant.trainer.loss.student_view import StudentView, summarise_logits
from decant.trainer.loss.tail_corrections import (
    correction_from_draws,
    correction_from_prior,
    log_prior_at,
)
from decant.trainer.loss.targets import BatchTargets

TOP = 5
"""Number of likeliest tokens that `top5_agreement` compares."""


class Measures(NamedTuple):
    """One value a position; a field is None if the cache lacks the arrays for it."""

    kl_bound: Float[Array, "*position"]
    """KL(teacher ‖ student) in nats with the tail as one category: a lower bound of the true KL."""
    kl_estimate: Float[Array, "*position"] | None
    """The same KL, estimated with the teacher's tail distributed like the tail prior."""
    kl_unbiased: Float[Array, "*position"] | None
    """The same KL, estimated from tail draws: noisy, but unbiased."""
    kl_counts: Float[Array, "*position"] | None
    """The same KL, estimated from counts: noisy, right on average. Without a top-k: the KL to the
    counts."""
    kl_sketch: Float[Array, "*position"] | None
    """The same KL, with the shape of the teacher's tail taken from the sketch."""
    kl_bound_at_temperature: Float[Array, "*position"]
    """`kl_bound` with both distributions at the training temperature; without the factor T²."""
    kl_estimate_at_temperature: Float[Array, "*position"] | None
    """`kl_estimate`, likewise."""
    kl_sketch_at_temperature: Float[Array, "*position"] | None
    """`kl_sketch`, likewise."""
    ce: Float[Array, "*position"]
    """Cross-entropy: −log of the next token's probability, in nats."""
    agreement: Float[Array, "*position"]
    """1 where the student's likeliest token is the teacher's."""
    top5_agreement: Float[Array, "*position"]
    """Share of the teacher's five likeliest tokens, or of all stored ones if these are fewer, that
    are among the student's five. Of equal logits the lower id counts as likelier."""
    accuracy: Float[Array, "*position"]
    """1 where the student's likeliest token is the next token."""
    confidence: Float[Array, "*position"]
    """Probability of the student's likeliest token."""
    acceptance_low: Float[Array, "*position"]
    """Lower bound of the probability that speculative decoding keeps a token that the student
    drafts: Σ min(p, q) over the stored tokens."""
    acceptance_high: Float[Array, "*position"]
    """Upper bound of it: `acceptance_low` plus the smaller of the two tail masses."""


class MeasureInputs(NamedTuple):
    """Arrays that measures need besides a batch."""

    temperature: Float[Array, ""] | None
    """The loss's temperature at the end of training; None stands for 1."""
    prior: Float[Array, "nodes vocab"] | None
    """The log tail prior at each node; None if the cache has none."""
    sketch: SketchTables | None = None
    """None if the cache has no sketch."""


def batch_measures(
    objective: Objective, params: Parameters, batch: Batch, inputs: MeasureInputs
) -> Measures:
    """Measures of shape [rows, positions]; values at positions without a target are arbitrary.

    Of `objective` only the graph, the vocabulary and `chunk_tokens` are used.
    """
    model = nnx.merge(objective.graph, params)
    hidden, _ = model(batch["tokens"], batch["segment_ids"], batch["positions"])
    # A checkpoint may pad its vocabulary; ids above the tokenizer's have no target.
    matrix = model.unembedding()[:, : objective.vocabulary].astype(hidden.dtype)
    rows, length, _ = hidden.shape
    step = positions_at_once(
        objective.loss.chunk_tokens, rows=rows, length=length, vocabulary=objective.vocabulary
    )

    def measure_chunk(chunk: tuple[Array, BatchTargets]) -> Measures:
        states, targets = flatten_rows(chunk)
        logits = logits_of(states, matrix, softcap=model.config.final_softcap)
        measures = chunk_measures(logits, targets, inputs)
        return jax.tree.map(lambda x: x.reshape(rows, step), measures)

    chunks = cut_positions((hidden, BatchTargets.of(batch)), step)
    measures = jax.lax.map(measure_chunk, chunks)
    return jax.tree.map(lambda x: join_positions(x, length=length), measures)


def chunk_measures(
    logits: Float[Array, "n vocab"], targets: BatchTargets, inputs: MeasureInputs
) -> Measures:
    """Measures of n positions from the student's logits."""
    one = jnp.float32(1)
    kl, view = _divergences(logits, targets, inputs, one)
    warm = kl
    if inputs.temperature is not None:
        # Draws and counts are of T = 1. A cache of counts alone knows no other T.
        others = targets._replace(tail_ids=None, count_ids=None)
        warm, _ = _divergences(logits, others, inputs, inputs.temperature)
    likeliest = jnp.argmax(logits, axis=-1)
    highest = jnp.max(logits, axis=-1)
    low, high = _acceptance(view, targets)
    return Measures(
        kl_bound=kl.bound,
        kl_estimate=kl.prior,
        kl_unbiased=kl.draws,
        kl_counts=kl.counts,
        kl_sketch=kl.sketch,
        kl_bound_at_temperature=warm.bound,
        kl_estimate_at_temperature=warm.prior,
        kl_sketch_at_temperature=warm.sketch,
        ce=view.z_hard - view.label,
        agreement=(likeliest == targets.likeliest).astype(jnp.float32),
        top5_agreement=_shared_top(logits, targets),
        accuracy=(likeliest == targets.labels).astype(jnp.float32),
        confidence=jnp.exp(highest - view.z_hard),
        acceptance_low=low,
        acceptance_high=high,
    )


class _Divergences(NamedTuple):
    """KL at one T by each estimate; None if its arrays are missing."""

    bound: Float[Array, " n"]
    prior: Float[Array, " n"] | None
    draws: Float[Array, " n"] | None
    counts: Float[Array, " n"] | None
    sketch: Float[Array, " n"] | None


def _divergences(
    logits: Float[Array, "n vocab"],
    targets: BatchTargets,
    inputs: MeasureInputs,
    temperature: Float[Array, ""],
) -> tuple[_Divergences, StudentView]:
    beta, whole = 1 / temperature, Vocabulary(logits.shape[-1])
    log_prior = None if inputs.prior is None else log_prior_at(inputs.prior, beta=beta)
    bound, view, teacher = bound_and_view(logits, targets, beta=beta, log_prior=log_prior)
    prior = draws = counts = sketch = None
    if log_prior is not None:
        correction = correction_from_prior(view, teacher, log_prior, beta=beta, vocabulary=whole)
        prior = bound + correction.value
    if targets.tail_ids is not None:
        draws = bound + correction_from_draws(view, targets, teacher, beta=beta).value
    if targets.count_ids is not None:
        counts = correction_from_counts(view, targets).value
    if targets.sketch is not None and inputs.sketch is not None:
        theirs = sketch_logits(targets, inputs.sketch.at(temperature), vocabulary=whole)
        _, cross = log_shape(theirs, view, beta=beta, vocabulary=whole)
        sketch = bound + correction_from_sketch(view, teacher, cross).value
    return _Divergences(bound, prior, draws, counts, sketch), view


def bound_and_view(
    logits: Float[Array, "n vocab"],
    targets: BatchTargets,
    *,
    beta: Float[Array, ""],
    log_prior: Float[Array, " vocab"] | None = None,
) -> tuple[Float[Array, " n"], StudentView, TeacherCategories]:
    """KL(teacher ‖ student) at β = 1/T with the tail as one category, and both distributions."""
    whole = Vocabulary(logits.shape[-1])
    view = summarise_logits(logits, targets, beta=beta, vocabulary=whole, log_prior=log_prior)
    counted = targets.mask[:, None]
    if targets.topk_ids.shape[-1]:
        teacher = teacher_categories(
            jnp.where(targets.stored, targets.topk_logprobs, -jnp.inf),
            targets.tail_logmass,
            beta=beta,
            tail="bucket",
        )
    else:
        teacher = whole_as_tail(view, targets)
    logq = jnp.concatenate([beta * view.head, view.tail_soft[:, None]], -1) - view.z_soft[:, None]
    bound = divergence(teacher.logp, jnp.where(counted, logq, -jnp.inf), kind="forward_kl")
    return bound, view, teacher


def _acceptance(
    view: StudentView, targets: BatchTargets
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Lower and upper bound of Σ_v min(p_v, q_v) over the whole vocabulary."""
    kept = targets.stored
    if not kept.shape[-1]:
        return jnp.zeros_like(view.z_hard), jnp.ones_like(view.z_hard)
    p = jnp.where(kept, jnp.exp(jnp.where(kept, targets.topk_logprobs, 0.0)), 0.0)
    low = jnp.sum(jnp.minimum(p, jnp.exp(view.head - view.z_hard[:, None])), axis=-1)
    tails = jnp.exp(targets.tail_logmass[:, -1]), jnp.exp(view.tail_hard - view.z_hard)
    return low, low + jnp.minimum(*tails)


def _shared_top(logits: Float[Array, "n vocab"], targets: BatchTargets) -> Float[Array, " n"]:
    """`top5_agreement`. For each stored id, likelier ids are counted: one pass each, no sorting."""
    kept, columns = targets.stored[:, :TOP], targets.topk_ids[:, :TOP]
    if not kept.shape[-1]:
        kept, columns = targets.taught[:, None], targets.likeliest[:, None]
    ids = jnp.arange(logits.shape[-1])

    def among(column: Int[Array, " n"]) -> Bool[Array, " n"]:
        own = jnp.take_along_axis(logits, column[:, None], axis=-1)
        likelier = (logits > own) | ((logits == own) & (ids < column[:, None]))
        return jnp.sum(likelier, axis=-1) < TOP

    shared = jnp.stack([among(columns[:, i]) for i in range(columns.shape[1])], axis=-1)
    return jnp.sum(shared & kept, axis=-1) / jnp.maximum(jnp.sum(kept, axis=-1), 1)
