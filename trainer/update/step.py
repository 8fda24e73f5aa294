"""One update as a pure function: (state, batch) → (state, metrics). It neither logs nor saves.

Gradients of microbatches are sums divided by the counted tokens of the *whole* batch, so that
accumulating equals computing at once but for rounding. An update whose loss or gradient is not
finite leaves weights and moments as they were and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from decant.models.mesh.execution import ALONE, Execution
from decant.models.mesh.sharding import everywhere, rows_here, split_rows
from decant.schemas.records.rows import next_tokens
from decant.trainer.config import Loss, Optimiser, Train
from decant.trainer.loss.chunk import Recipe, Sums
from decant.trainer.loss.divergences import Tail
from decant.trainer.loss.head import distillation_loss
from decant.trainer.loss.layer_pairs import NO_PAIRS, Pairs
from decant.trainer.loss.layer_terms import Matrices, TermSums, term_sums
from decant.trainer.loss.projections import PROJECTIONS, without_projections
from decant.trainer.loss.student_view import Targets
from decant.trainer.run.requirements import DRAWS, TOPK, arrays, fields
from decant.trainer.update.optimiser import learning_rate, optimiser
from decant.trainer.update.parameter_names import Trained
from decant.trainer.update.state_sharding import like_parameters

Batch = dict[str, Array]
Parameters = dict[str, Any]
"""The student's, and under `PROJECTIONS` those that are trained beside it, if there are any."""
Values = dict[str, Array]
"""α, T and the λs of one update, as `Loss.schedules` names them."""
Prior = Float[Array, "nodes vocab"] | None
"""The tail prior at the nodes, for tail = "prior"."""


class TrainState(NamedTuple):
    """All that an update changes. `moments` is optax's state."""

    params: Parameters
    moments: Any
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


class Totals(NamedTuple):
    """Sums over counted positions of a batch: the head's parts, and the terms'."""

    head: Sums
    terms: TermSums


def initial_state(params: Parameters, *, config: Optimiser, mesh: Mesh | None = None) -> TrainState:
    """The state before the first update; on a mesh, moments lie like their parameters."""
    init = optimiser(config).init
    # Three zeros, not one three times: a buffer can be donated once.
    if mesh is None:
        zeros = (jnp.zeros((), jnp.int32) for _ in range(3))
        return TrainState(params, init(params), *zeros)
    places = like_parameters(jax.eval_shape(init, params), params=params, mesh=mesh)
    moments = jax.jit(init, out_shardings=places)(params)
    return TrainState(
        params, moments, *(everywhere(np.zeros((), np.int32), mesh) for _ in range(3))
    )


class TrainStep(NamedTuple):
    """An update as a function of state and batch. The given state is consumed: its buffers become
    the new one's."""

    compiled: Any
    given: tuple
    """What every update takes besides."""

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """One update."""
        return self.compiled(state, batch, *self.given)

    def lower(self, state: TrainState, batch: Batch) -> Any:
        """Its program, to be looked at; see `jax.stages`."""
        return self.compiled.lower(state, batch, *self.given)


def make_train_step(
    graph: nnx.GraphDef,
    *,
    config: Train,
    vocabulary: int,
    steps: int,
    prior: Prior = None,
    pairs: Pairs = NO_PAIRS,
    directions: Matrices | None = None,
    mesh: Mesh | None = None,
    places: TrainState | None = None,
) -> TrainStep:
    """The compiled update; `steps` is the length of the schedules.

    `pairs` are those of `config.loss`, `directions` by signal for those that want them. On a `mesh`
    `places` are the shardings of the state, which it keeps.

    Metrics: loss, kl_loss (forward KL at T, in the sense of `Sums.kl`), ce_loss, agreement: means
    over the counted positions, `tokens` of them, or those that a teacher said something of;
    hidden_state_loss and attention_loss, means over the terms without their λs, if there are any;
    alpha, temperature and each λ that changes, learning_rate, grad_norm of what is trained before
    clipping, skipped, skipped_in_a_row.
    """
    rate = learning_rate(config.optimiser, steps=steps)

    def train_step(
        state: TrainState, batch: Batch, prior: Prior, directions: Matrices | None
    ) -> tuple[TrainState, dict[str, Array]]:
        values = values_at(config.loss, state.step, steps=steps)
        loss, totals, gradient = mean_gradient(
            graph,
            state.params,
            batch,
            loss=config.loss,
            values=values,
            prior=prior,
            pairs=pairs,
            directions=directions,
            vocabulary=vocabulary,
            microbatches=config.data.microbatches,
            execution=Execution(mesh, config.remat),
        )
        if places is not None:
            # Else every device would sum up whole gradients, and then keep its share.
            gradient = jax.lax.with_sharding_constraint(gradient, places.params)
        now = jnp.float32(rate(state.step + 1))  # The first update is not wasted on a rate of 0.
        norm = optax.tree.norm(Trained(gradient, freeze=config.optimiser.freeze).of(gradient))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        state = updated(state, gradient, rate=now, finite=finite, config=config.optimiser)
        return state, {
            "loss": loss,
            **means(totals),
            **reported(config.loss, values),
            "grad_norm": norm,
            "learning_rate": now,
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        }

    out = None
    if mesh is not None and places is not None:
        out = (places, NamedSharding(mesh, PartitionSpec()))
    # Arguments to the compiled step: closed over, they would be constants of megabytes in it.
    given = (prior, directions)
    return TrainStep(jax.jit(train_step, donate_argnums=0, out_shardings=out), given)


def values_at(loss: Loss, step: Int[Array, ""] | int, *, steps: int) -> Values:
    """What the schedules say for the update that follows `step` others."""
    return {name: schedule.at(step, steps=steps) for name, schedule in loss.schedules.items()}


def updated(
    state: TrainState,
    gradient: Parameters,
    *,
    rate: Float[Array, ""],
    finite: Bool[Array, ""],
    config: Optimiser,
) -> TrainState:
    """The state after one update, or after skipping it where loss or gradient is not finite."""
    direction, moments = optimiser(config).update(gradient, state.moments, state.params)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
    bad = jnp.where(finite, 0, 1).astype(jnp.int32)

    def chosen(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    return TrainState(
        params=chosen(params, state.params),
        moments=chosen(moments, state.moments),
        step=state.step + 1,
        skipped=state.skipped + bad,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
    )


def reported(loss: Loss, values: Values) -> Values:
    """α and T, and whatever else changes over the run."""
    moving = {name for name, schedule in loss.schedules.items() if schedule.end is not None}
    return {name: values[name] for name in values if name in {"alpha", "temperature"} | moving}


def to_device(
    batch: dict[str, np.ndarray],
    *,
    mesh: Mesh,
    rows: int | None = None,
    tail: Tail = "bucket",
    signals: Sequence[str] = (),
) -> Batch:
    """What an update needs of a batch, its rows split over the mesh.

    Of a batch of `rows`, `batch` has those that are this process's (`rows_here`); None: all.
    """
    needed = (*fields(tail), *arrays(signals, batch))
    if rows is None:
        rows = len(batch["tokens"])
        here = rows_here(mesh, rows)
        batch = {name: batch[name][here] for name in needed}
    return {name: split_rows(batch[name], count=rows, mesh=mesh) for name in needed}


def batch_sums(
    graph: nnx.GraphDef,
    params: Parameters,
    batch: Batch,
    *,
    loss: Loss,
    values: Values,
    vocabulary: int,
    prior: Prior = None,
    pairs: Pairs = NO_PAIRS,
    directions: Matrices | None = None,
    execution: Execution = ALONE,
) -> tuple[Float[Array, ""], Totals]:
    """The loss summed over a batch's counted positions, and its parts."""
    model = nnx.merge(graph, without_projections(params))
    hidden, states = model(
        batch["tokens"],
        batch["segment_ids"],
        batch["positions"],
        hidden_layers=pairs.hidden_layers,
        execution=execution,
    )
    targets = Targets(
        labels=next_tokens(batch["tokens"], xp=jnp),
        mask=batch["loss_mask"],
        **{name: batch[name] for name in (*TOPK, *DRAWS) if name in batch},
    )
    value, head = distillation_loss(
        hidden,
        model.unembedding(),
        targets,
        temperature=values["temperature"],
        alpha=values["alpha"],
        prior=prior,
        recipe=Recipe(
            loss.divergence,
            loss.mix,
            loss.tail,
            loss.chunk_tokens,
            softcap=model.config.final_softcap,
        ),
        # A checkpoint may pad its vocabulary; ids beyond the tokenizer's have no target.
        vocabulary=vocabulary,
        mesh=execution.mesh,
    )
    matrices = {**params.get(PROJECTIONS, {}), **(directions or {})}
    # Rows of a cache without a teacher's targets have no teacher's states either.
    taught = batch["loss_mask"] & jnp.isfinite(batch["topk_logprobs"][..., 0])
    compared = {**batch, "loss_mask": taught}
    terms = term_sums(model, states, compared, loss=loss, pairs=pairs, matrices=matrices)
    weights = [values[f"{name}.weight"] for name in loss.terms]
    for weight, term in zip(weights, (*terms.hidden, *terms.attention), strict=True):
        value += weight * term
    return value, Totals(head, terms)


def means(totals: Totals) -> dict[str, Array]:
    """Sums over positions as means, and how many positions."""
    sums, terms = totals
    count, taught = jnp.maximum(sums.count, 1), jnp.maximum(sums.taught, 1)
    found = {
        "kl_loss": sums.kl / taught,
        "ce_loss": sums.ce / count,
        "agreement": sums.agreement / taught,
        "tokens": sums.count,
    }
    kinds = {"hidden_state_loss": terms.hidden, "attention_loss": terms.attention}
    return found | {name: sum(some) / len(some) / taught for name, some in kinds.items() if some}


def mean_gradient(
    graph: nnx.GraphDef,
    params: Parameters,
    batch: Batch,
    *,
    loss: Loss,
    values: Values,
    vocabulary: int,
    microbatches: int,
    prior: Prior = None,
    pairs: Pairs = NO_PAIRS,
    directions: Matrices | None = None,
    execution: Execution = ALONE,
) -> tuple[Float[Array, ""], Totals, Parameters]:
    """The loss's mean over the whole batch's counted tokens, its parts, and the gradient."""
    total = jnp.maximum(jnp.sum(batch["loss_mask"]), 1).astype(jnp.float32)

    def mean_loss(params, piece):
        value, totals = batch_sums(
            graph,
            params,
            piece,
            loss=loss,
            values=values,
            vocabulary=vocabulary,
            prior=prior,
            pairs=pairs,
            directions=directions,
            execution=execution,
        )
        return value / total, totals

    value_and_gradient = jax.value_and_grad(mean_loss, has_aux=True)
    if microbatches == 1:
        (value, totals), gradient = value_and_gradient(params, batch)
        return value, totals, gradient

    def piece(x):  # Every microbatch takes from all over the batch: each device keeps its rows.
        return jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0)

    def add(carry, piece):
        (value, totals), gradient = value_and_gradient(params, piece)
        return jax.tree.map(jnp.add, carry, (value, totals, gradient)), None

    zero = jnp.float32(0)
    none = TermSums((zero,) * len(loss.hidden), (zero,) * len(loss.attention))
    totals = Totals(Sums(zero, zero, zero, zero, zero), none)
    nothing = (zero, totals, jax.tree.map(jnp.zeros_like, params))
    carry, _ = jax.lax.scan(add, nothing, jax.tree.map(piece, batch))
    return carry
