"""What a student is judged by at each position, against what a cache knows of the teacher there.

The logits of a chunk of positions are turned into a few numbers each, as in training, so that
logits of a whole batch never exist. All are of T = 1 but for the two that say otherwise.
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
from decant.trainer.loss.divergences import divergence, teacher_categories
from decant.trainer.loss.objective import Objective
from decant.trainer.loss.position_chunks import (
    cut_positions,
    flatten_rows,
    join_positions,
    positions_at_once,
)
from decant.trainer.loss.projections import Parameters
from decant.trainer.loss.student_view import StudentView, summarise_logits
from decant.trainer.loss.tail_corrections import (
    correction_from_draws,
    correction_from_prior,
    log_prior_at,
)
from decant.trainer.loss.targets import BatchTargets

TOP = 5
"""How many of the likeliest tokens `top5_agreement` compares."""


class Measures(NamedTuple):
    """Of each position; None: the cache cannot tell."""

    kl_bound: Float[Array, "*position"]
    """KL(teacher ‖ student) with the tail as one category: at most the true one. Nats."""
    kl_estimate: Float[Array, "*position"] | None
    """The same with the tail spread as the tail prior says."""
    kl_unbiased: Float[Array, "*position"] | None
    """The same from draws: noisy, but right on average."""
    kl_bound_at_temperature: Float[Array, "*position"]
    """Both sides at the training temperature; no T²."""
    kl_estimate_at_temperature: Float[Array, "*position"] | None
    ce: Float[Array, "*position"]
    """−log of the next token's probability."""
    agreement: Float[Array, "*position"]
    """1 where the student's likeliest token is the teacher's."""
    top5_agreement: Float[Array, "*position"]
    """Share of the teacher's five likeliest tokens (of as many as are stored) that are among the
    student's five; of equals the lower id is the likelier one."""
    accuracy: Float[Array, "*position"]
    """1 where the student's likeliest token is the next token."""
    confidence: Float[Array, "*position"]
    """Probability of the student's likeliest token."""
    acceptance_low: Float[Array, "*position"]
    """Σ min(p, q) over the stored tokens: speculative decoding, with the student as the draft,
    keeps a token with at least this probability,"""
    acceptance_high: Float[Array, "*position"]
    """and at most with this, which adds min of the two tails' masses."""


class MeasureInputs(NamedTuple):
    """Arrays that measures need besides a batch."""

    temperature: Float[Array, ""] | None
    """That training ended at; None: 1."""
    prior: Float[Array, "nodes vocab"] | None
    """The tail prior's nodes, if the cache has one."""


def batch_measures(
    objective: Objective, params: Parameters, batch: Batch, inputs: MeasureInputs
) -> Measures:
    """[rows, positions] of each measure; what a position without a target has means nothing."""
    model = nnx.merge(objective.graph, params)
    hidden, _ = model(batch["tokens"], batch["segment_ids"], batch["positions"])
    # A checkpoint may pad its vocabulary; ids beyond the tokenizer's have no target.
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
    """The measures of n positions."""
    one = jnp.float32(1)
    bound, estimate, unbiased, view = _divergences(logits, targets, inputs, one)
    warm_bound, warm_estimate = bound, estimate
    if inputs.temperature is not None:
        undrawn = targets._replace(tail_ids=None)
        warm_bound, warm_estimate, *_ = _divergences(logits, undrawn, inputs, inputs.temperature)
    likeliest = jnp.argmax(logits, axis=-1)
    highest = jnp.max(logits, axis=-1)
    first = jnp.where(targets.stored[:, 0], targets.topk_ids[:, 0], -1)
    low, high = _acceptance(view, targets)
    return Measures(
        kl_bound=bound,
        kl_estimate=estimate,
        kl_unbiased=unbiased,
        kl_bound_at_temperature=warm_bound,
        kl_estimate_at_temperature=warm_estimate,
        ce=view.z_hard - view.label,
        agreement=(likeliest == first).astype(jnp.float32),
        top5_agreement=_shared_top(logits, targets),
        accuracy=(likeliest == targets.labels).astype(jnp.float32),
        confidence=jnp.exp(highest - view.z_hard),
        acceptance_low=low,
        acceptance_high=high,
    )


def _divergences(
    logits: Float[Array, "n vocab"],
    targets: BatchTargets,
    inputs: MeasureInputs,
    temperature: Float[Array, ""],
) -> tuple[Array, Array | None, Array | None, StudentView]:
    """KL at T by the bucket, by the prior and by draws, each if it can be; and the view."""
    beta = 1 / temperature
    log_prior = None if inputs.prior is None else log_prior_at(inputs.prior, beta=beta)
    whole = Vocabulary(logits.shape[-1])
    view = summarise_logits(logits, targets, beta=beta, vocabulary=whole, log_prior=log_prior)
    there = targets.mask[:, None]
    teacher = teacher_categories(
        jnp.where(targets.stored, targets.topk_logprobs, -jnp.inf),
        targets.tail_logmass,
        beta=beta,
        tail="bucket",
    )
    logq = jnp.concatenate([beta * view.head, view.tail_soft[:, None]], -1) - view.z_soft[:, None]
    bound = divergence(teacher.logp, jnp.where(there, logq, -jnp.inf), kind="forward_kl")
    estimate = unbiased = None
    if log_prior is not None:
        estimate = (
            bound
            + correction_from_prior(view, teacher, log_prior, beta=beta, vocabulary=whole).value
        )
    if targets.tail_ids is not None:
        unbiased = bound + correction_from_draws(view, targets, teacher, beta=beta).value
    return bound, estimate, unbiased, view


def _acceptance(
    view: StudentView, targets: BatchTargets
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Both ends of Σ_v min(p_v, q_v)."""
    kept = targets.stored
    p = jnp.where(kept, jnp.exp(jnp.where(kept, targets.topk_logprobs, 0.0)), 0.0)
    low = jnp.sum(jnp.minimum(p, jnp.exp(view.head - view.z_hard[:, None])), axis=-1)
    tails = jnp.exp(targets.tail_logmass[:, -1]), jnp.exp(view.tail_hard - view.z_hard)
    return low, low + jnp.minimum(*tails)


def _shared_top(logits: Float[Array, "n vocab"], targets: BatchTargets) -> Float[Array, " n"]:
    """By counting what is likelier than each, which sorts nothing: a pass over the logits each."""
    kept = targets.stored[:, :TOP]
    ids = jnp.arange(logits.shape[-1])

    def among(column: Int[Array, " n"]) -> Bool[Array, " n"]:
        own = jnp.take_along_axis(logits, column[:, None], axis=-1)
        likelier = (logits > own) | ((logits == own) & (ids < column[:, None]))
        return jnp.sum(likelier, axis=-1) < TOP

    columns = targets.topk_ids[:, :TOP]
    shared = jnp.stack([among(columns[:, i]) for i in range(columns.shape[1])], axis=-1)
    return jnp.sum(shared & kept, axis=-1) / jnp.maximum(jnp.sum(kept, axis=-1), 1)
