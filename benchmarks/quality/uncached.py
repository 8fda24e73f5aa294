"""Trains students with targets that no cache holds: dense, RS-KD, and counts drawn at each visit.

Rows and their order, the initial student, optimiser and schedule are the trainer's. So is the loss
of counts, `tail = "counts"`: RS-KD's are of independent draws, a cache's of equally spaced ones.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.quality.teacher import DenseTeacher
from decant.models.mesh.execution import Execution
from decant.models.mesh.sharding import teacher_mesh
from decant.models.numerics import logits as head
from decant.schemas import open_cache
from decant.schemas.disk.atomic import replacing
from decant.schemas.records.rows import next_tokens
from decant.schemas.targets.counts import count_draws
from decant.trainer.config import Loss, Train
from decant.trainer.data.batches import Batches
from decant.trainer.loss.batch_fields import to_device
from decant.trainer.loss.objective import Objective
from decant.trainer.run.initial_student import initial_student
from decant.trainer.run.student_parameters import graph_and_parameters
from decant.trainer.update.optimiser import learning_rate
from decant.trainer.update.step import initial_state, make_train_step, updated_state

COUNT_FIELDS = ("count_ids", "counts")
DRAWS_AT_A_TIME = 512


def train_dense(config: Train, teacher: DenseTeacher) -> tuple[nnx.GraphDef, Any, list[float]]:
    """Train on dense targets: graph, parameters, and seconds of each update without the teacher."""

    def targets(batch):
        return {"teacher_hidden": teacher.hidden(batch["rows"])}

    def make_step(graph):
        return make_dense_step(graph, config=config, unembedding=teacher.unembedding)

    return _train(config, targets=targets, make_step=make_step)


def train_rs_kd(
    config: Train, teacher: DenseTeacher, *, draws: int, directory: Path
) -> tuple[nnx.GraphDef, Any, list[float]]:
    """Train on RS-KD targets with `draws` draws a position; they are kept in `directory`."""
    stored = _stored_rs_kd(config, teacher, draws=draws, directory=directory)

    def targets(batch):
        at = np.searchsorted(stored["rows"], batch["rows"])
        return {name: jnp.asarray(stored[name][at]) for name in COUNT_FIELDS}

    return _train_on_counts(config, teacher, targets=targets)


def train_fresh(
    config: Train, teacher: DenseTeacher, *, draws: int
) -> tuple[nnx.GraphDef, Any, list[float]]:
    """Train on counts of `draws` equally spaced draws that are new at each visit of a row."""
    keys = (
        jax.random.fold_in(jax.random.key(config.data.seed), visit) for visit in itertools.count()
    )

    def targets(batch):
        return fresh_targets(teacher, batch["rows"], draws=draws, key=next(keys))

    return _train_on_counts(config, teacher, targets=targets)


def _train_on_counts(config: Train, teacher: DenseTeacher, *, targets: Callable):
    def make_step(graph):
        return make_train_step(
            Objective(
                graph,
                config.loss,
                vocabulary=teacher.vocabulary,
                execution=Execution(remat=config.remat),
            ),
            optimiser=config.optimiser,
            steps=config.data.steps or 0,
            microbatches=config.data.microbatches,
        )

    return _train(config, targets=targets, make_step=make_step)


def _stored_rs_kd(
    config: Train, teacher: DenseTeacher, *, draws: int, directory: Path
) -> dict[str, np.ndarray]:
    """RS-KD targets of all train rows, drawn once and stored."""
    path = directory / f"rs-kd-{draws}.npz"
    if not path.exists():
        rows = np.sort(open_cache(config.cache).rows(split="train"))
        targets = rs_kd_targets(teacher, rows, draws=draws)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, rows=rows, **targets)
    return dict(np.load(path))


def _train(config: Train, *, targets: Callable, make_step: Callable):
    """Run all updates without logging, evaluating or saving."""
    cache, mesh = open_cache(config.cache), teacher_mesh()
    config.run.mkdir(parents=True, exist_ok=True)
    student = initial_student(
        config.student, cache=cache, run=config.run, dtype=config.dtype, seed=config.data.seed
    )
    graph, params = graph_and_parameters(student)
    state, step = initial_state(params, config=config.optimiser), make_step(graph)
    batches = Batches(cache, config=config.data)
    seconds = []
    for _ in range(config.data.steps or 0):
        batch = batches.next()
        on_device = {**to_device(batch, mesh=mesh), **targets(batch)}
        jax.block_until_ready(on_device)
        start = time.perf_counter()
        state, metrics = step(state, on_device)
        loss = float(metrics["loss"])
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
        if not np.isfinite(loss):
            raise FloatingPointError(f"{config.run}: loss {loss} at update {len(seconds)}")
    batches.close()
    return graph, state.params, seconds


def make_dense_step(graph: nnx.GraphDef, *, config: Train, unembedding: jax.Array) -> Callable:
    """The compiled update with the teacher's whole distribution as the target."""
    rate = learning_rate(config.optimiser, steps=config.data.steps or 0)

    def step(state, batch, unembedding):
        loss, gradient = dense_gradient(
            graph, state.params, batch, unembedding=unembedding, loss=config.loss
        )
        state = updated_state(
            state,
            gradient,
            rate=jnp.float32(rate(state.step + 1)),
            finite=jnp.isfinite(loss),
            config=config.optimiser,
        )
        return state, {"loss": loss}

    compiled = jax.jit(step, donate_argnums=0)
    return lambda state, batch: compiled(state, batch, unembedding)


def dense_gradient(
    graph: nnx.GraphDef, params: Any, batch: dict, *, unembedding: jax.Array, loss: Loss
) -> tuple[jax.Array, Any]:
    """The textbook loss, a mean over counted tokens, and its gradient by autodiff.

    α·T²·KL(p ‖ q) + (1 − α)·CE with p = softmax(z/T) and q = softmax(s/T) over all tokens.
    """

    def mean_loss(params):
        model = nnx.merge(graph, params)
        hidden, _ = model(batch["tokens"], batch["segment_ids"], batch["positions"])
        matrix = model.unembedding()[:, : unembedding.shape[1]]
        student = head(_flat(hidden), matrix, softcap=model.config.final_softcap)
        teacher = head(_flat(batch["teacher_hidden"]), unembedding, softcap=None)
        mask = batch["loss_mask"].reshape(-1)
        labels = next_tokens(batch["tokens"], xp=jnp).reshape(-1)
        logp = jax.nn.log_softmax(teacher / loss.temperature, axis=-1)
        logq = jax.nn.log_softmax(student / loss.temperature, axis=-1)
        kl = jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)
        ce = jax.nn.logsumexp(student, axis=-1) - jnp.take_along_axis(
            student, labels[:, None], axis=-1
        ).squeeze(-1)
        alpha = loss.first_alpha
        each = alpha * loss.temperature**2 * kl + (1 - alpha) * ce
        return jnp.sum(jnp.where(mask, each, 0.0)) / jnp.maximum(jnp.sum(mask), 1)

    return jax.value_and_grad(mean_loss)(params)


def rs_kd_targets(teacher: DenseTeacher, rows: np.ndarray, *, draws: int) -> dict[str, np.ndarray]:
    """RS-KD targets of these rows: `count_ids` and `counts`, both int32 [n, S, draws].

    They count `draws` independent ids from the teacher at T = 1, which are seeded by the row's
    number: a row has the same draws at every visit, as in a cache.
    """
    drawn = [draw_ids_of_row(teacher, int(row), draws=draws) for row in rows]
    return _count_arrays(np.concatenate(drawn), rows=len(rows))


def fresh_targets(
    teacher: DenseTeacher, rows: np.ndarray, *, draws: int, key: jax.Array
) -> dict[str, np.ndarray]:
    """Counts of `draws` equally spaced draws of these rows, as `rs_kd_targets` gives them."""
    hidden = teacher.hidden(rows)
    uniform = jax.random.uniform(key, (*hidden.shape[:2], 1))
    points = ((jnp.arange(draws) + uniform) / draws).reshape(-1, draws)
    ids = _inverse_cdf(_flat(hidden), teacher.unembedding, points)
    return _count_arrays(np.asarray(ids), rows=len(rows))


def _count_arrays(drawn: np.ndarray, *, rows: int) -> dict[str, np.ndarray]:
    """`count_ids` and `counts` [rows, S, draws] of drawn ids [rows · S, draws]."""
    draws, counted = drawn.shape[1], count_draws(drawn)
    unused = ((0, 0), (0, draws - counted.ids.shape[1]))
    pairs = zip(COUNT_FIELDS, (counted.ids, counted.counts), strict=True)
    return {name: np.pad(x, unused).reshape(rows, -1, draws) for name, x in pairs}


def draw_ids_of_row(teacher: DenseTeacher, row: int, *, draws: int) -> np.ndarray:
    """`draws` independent ids for each position of a row, int32 [S, draws].

    Fewer draws are the first columns of more draws.
    """
    hidden = teacher.hidden(np.array([row]))[0]
    uniform = jax.random.uniform(jax.random.key(row), (DRAWS_AT_A_TIME, len(hidden)))[:draws].T
    return np.asarray(_inverse_cdf(hidden, teacher.unembedding, uniform))


@jax.jit
def _inverse_cdf(hidden, unembedding, uniform):
    cdf = jnp.cumsum(jax.nn.softmax(head(hidden, unembedding, softcap=None), axis=-1), axis=-1)
    # Divided by its last value, so that rounding leaves no gap after the last token.
    cdf /= cdf[:, -1:]
    ids = jax.vmap(lambda c, u: jnp.searchsorted(c, u, side="right"))(cdf, uniform)
    return jnp.minimum(ids, unembedding.shape[1] - 1).astype(jnp.int32)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])
