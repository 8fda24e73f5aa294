"""Metrics of a student against the dense teacher, on held-out rows at T = 1."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.quality.teacher import DenseTeacher
from decant.models.numerics import logits as head
from decant.schemas import Cache
from decant.schemas.records.rows import next_tokens

BINS = 15
CHUNK_TOKENS = 256


def judge(
    graph: nnx.GraphDef, params: Any, *, cache: Cache, teacher: DenseTeacher, batch_rows: int
) -> dict[str, float]:
    """Means over all held-out positions.

    ce: cross-entropy in nats. kl: KL(teacher ‖ student) in nats over the whole vocabulary.
    agreement: share of positions where both have the same first choice. ece: expected calibration
    error of the student's first choice against the real next token, 15 bins of equal width.
    """
    rows = cache.rows(split="heldout")
    totals: Any = None
    for at in range(0, len(rows), batch_rows):
        chosen = rows[at : at + batch_rows]
        padded = np.concatenate([chosen, np.repeat(chosen[:1], batch_rows - len(chosen))])
        batch = cache.read(padded, signals=())
        batch["loss_mask"][len(chosen) :] = False
        batch_sums = _sums(graph, params, batch, teacher.hidden(padded), teacher.unembedding)
        totals = batch_sums if totals is None else jax.tree.map(np.add, totals, batch_sums)
    return metrics(jax.tree.map(np.asarray, totals))


def metrics(totals: dict[str, np.ndarray]) -> dict[str, float]:
    """Means from sums over positions."""
    count = float(totals["count"])
    gaps = np.abs(totals["correct_in_bin"] - totals["confidence_in_bin"])
    return {
        "ce": float(totals["ce"]) / count,
        "kl": float(totals["kl"]) / count,
        "agreement": float(totals["agreement"]) / count,
        "ece": float(gaps.sum()) / count,
        "positions": int(count),
    }


@jax.jit(static_argnums=0)
def _sums(graph, params, batch, teacher_hidden, unembedding):
    model = nnx.merge(graph, params)
    hidden, _ = model(batch["tokens"], batch["segment_ids"], batch["positions"])
    matrix = model.unembedding()[:, : unembedding.shape[1]]
    positions = batch["tokens"].size
    chunk = CHUNK_TOKENS if positions % CHUNK_TOKENS == 0 else positions

    def one_chunk(pieces):
        student, teacher, labels, mask = pieces
        ours = head(student, matrix, softcap=model.config.final_softcap)
        return sums(ours, head(teacher, unembedding, softcap=None), labels, mask)

    labels = next_tokens(batch["tokens"], xp=jnp)
    arrays = (hidden, teacher_hidden, labels, batch["loss_mask"])
    chunks = (x.reshape(-1, chunk, *x.shape[2:]) for x in arrays)
    return jax.tree.map(lambda x: x.sum(0), jax.lax.map(one_chunk, tuple(chunks)))


def sums(student: jax.Array, teacher: jax.Array, labels: jax.Array, mask: jax.Array) -> dict:
    """Sums over counted positions, from logits [n, vocabulary] of both models."""
    counted = mask.astype(jnp.float32)
    logq, logp = jax.nn.log_softmax(student, axis=-1), jax.nn.log_softmax(teacher, axis=-1)
    label = jnp.take_along_axis(logq, labels[:, None], axis=-1)[:, 0]
    choice = jnp.argmax(logq, axis=-1)
    confidence = jnp.exp(jnp.max(logq, axis=-1))
    which = jnp.minimum((confidence * BINS).astype(jnp.int32), BINS - 1)
    in_bin = jax.nn.one_hot(which, BINS) * counted[:, None]
    return {
        "count": counted.sum(),
        "ce": -(counted * label).sum(),
        "kl": (counted * (jnp.exp(logp) * (logp - logq)).sum(-1)).sum(),
        "agreement": (counted * (choice == jnp.argmax(logp, axis=-1))).sum(),
        "confidence_in_bin": (in_bin * confidence[:, None]).sum(0),
        "correct_in_bin": (in_bin * (choice == labels)[:, None]).sum(0),
    }
