"""What a student predicts at each position of some rows, beside the teacher's stored targets."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from decant.models.numerics import logits as logits_of
from decant.trainer.judging.measures import bound_and_view
from decant.trainer.loss.batch_fields import Batch
from decant.trainer.loss.objective import Objective
from decant.trainer.loss.position_chunks import (
    cut_positions,
    flatten_rows,
    join_positions,
    positions_at_once,
)
from decant.trainer.loss.projections import Parameters
from decant.trainer.loss.targets import BatchTargets


class Predictions(NamedTuple):
    """Log-probabilities in nats at T = 1; arbitrary at positions without a target."""

    label_logprobs: Float[Array, "*position"]
    """Of the token that follows."""
    topk_logprobs: Float[Array, "*position k"]
    """Of the ids that the teacher's targets store, in their order; −inf where none is stored."""
    top_ids: Int[Array, "*position top"]
    """The student's likeliest ids, in falling order."""
    top_logprobs: Float[Array, "*position top"]
    kl_bound: Float[Array, "*position"]
    """KL(teacher ‖ student) with the tail as one category: a lower bound of the true KL."""


def batch_predictions(
    objective: Objective, params: Parameters, batch: Batch, *, top: int
) -> Predictions:
    """The student's predictions at [rows, positions], with its `top` likeliest ids.

    Of `objective` only the graph, the vocabulary and `chunk_tokens` are used.
    """
    model = nnx.merge(objective.graph, params)
    hidden, _ = model(batch["tokens"], batch["segment_ids"], batch["positions"])
    matrix = model.unembedding()[:, : objective.vocabulary].astype(hidden.dtype)
    rows, length, _ = hidden.shape
    step = positions_at_once(
        objective.loss.chunk_tokens, rows=rows, length=length, vocabulary=objective.vocabulary
    )

    def predict_chunk(chunk: tuple[Array, BatchTargets]) -> Predictions:
        states, targets = flatten_rows(chunk)
        logits = logits_of(states, matrix, softcap=model.config.final_softcap)
        predictions = chunk_predictions(logits, targets, top=top)
        return jax.tree.map(lambda x: x.reshape(rows, step, *x.shape[1:]), predictions)

    chunks = cut_positions((hidden, BatchTargets.of(batch)), step)
    predictions = jax.lax.map(predict_chunk, chunks)
    return jax.tree.map(lambda x: join_positions(x, length=length), predictions)


def chunk_predictions(
    logits: Float[Array, "n vocab"], targets: BatchTargets, *, top: int
) -> Predictions:
    """Predictions of n positions from the student's logits."""
    bound, view, _ = bound_and_view(logits, targets, beta=jnp.float32(1))
    likeliest, ids = jax.lax.top_k(logits, min(top, logits.shape[-1]))
    normaliser = view.z_hard[:, None]
    return Predictions(
        label_logprobs=view.label - view.z_hard,
        topk_logprobs=view.head - normaliser,
        top_ids=ids,
        top_logprobs=likeliest - normaliser,
        kl_bound=bound,
    )
