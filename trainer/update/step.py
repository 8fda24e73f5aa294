"""One update of the student as a pure function (state, batch) → (state, metrics).

It neither logs nor saves. Gradients of microbatches are sums, divided by the counted tokens of the
*whole* batch, so that microbatches change results by rounding only. An update with a non-finite
loss or gradient is skipped: it leaves weights and moments unchanged and is counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from decant.models.mesh.sharding import replicate
from decant.trainer.config import Optimiser
from decant.trainer.loss.batch_fields import Batch
from decant.trainer.loss.objective import (
    NO_TABLES,
    Objective,
    ScheduledValues,
    Tables,
    Totals,
    batch_sums,
    means,
    positions_per_pair,
    reported_values,
    scheduled_values,
    zero_totals,
)
from decant.trainer.loss.projections import Parameters
from decant.trainer.update.freezing import TrainedPart
from decant.trainer.update.optimiser import learning_rate, make_optimiser
from decant.trainer.update.state_sharding import moment_shardings


class TrainState(NamedTuple):
    """Everything that an update changes. `moments` is optax's state."""

    params: Parameters
    moments: Any
    step: Int[Array, ""]
    """Number of updates so far, skipped ones included."""
    skipped: Int[Array, ""]
    """Number of skipped updates."""
    skipped_in_a_row: Int[Array, ""]
    """Number of skipped updates since the last one that was not skipped."""


def initial_state(params: Parameters, *, config: Optimiser, mesh: Mesh | None = None) -> TrainState:
    """The state before the first update. On a mesh, moments are sharded like their parameters."""
    init = make_optimiser(config).init
    # Three arrays, because a buffer can be donated only once.
    if mesh is None:
        zeros = (jnp.zeros((), jnp.int32) for _ in range(3))
        return TrainState(params, init(params), *zeros)
    places = moment_shardings(jax.eval_shape(init, params), params=params, mesh=mesh)
    moments = jax.jit(init, out_shardings=places)(params)
    return TrainState(params, moments, *(replicate(np.zeros((), np.int32), mesh) for _ in range(3)))


class TrainStep(NamedTuple):
    """A compiled update. It consumes the given state: the new state takes its buffers."""

    compiled: Any
    tables: Tables

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """One update."""
        return self.compiled(state, batch, self.tables)

    def lower(self, state: TrainState, batch: Batch) -> Any:
        """The update's program; see `jax.stages.Lowered`."""
        return self.compiled.lower(state, batch, self.tables)


def make_train_step(
    objective: Objective,
    *,
    optimiser: Optimiser,
    steps: int,
    microbatches: int = 1,
    tables: Tables = NO_TABLES,
    places: TrainState | None = None,
) -> TrainStep:
    """The compiled update.

    `steps` is the number of updates of the run, the length of all schedules. `microbatches` is the
    number of pieces of a batch that are computed one after another. `places` are the shardings of
    the state on a mesh; the new state keeps them.

    Metrics:
    - loss; `tokens`, the number of counted positions; ce_loss, a mean over them;
    - kl_loss (forward KL at T, see `HeadSums.kl`) and agreement, means over the counted positions
      with a teacher's targets; with `divergence = on_policy` advantage, ratio and clipped instead
      (`PolicyTerms`), means over the written tokens;
    - hidden_state_loss and attention_loss, means over the terms of that kind without λ, if any;
    - alpha, temperature, each λ that changes over the run, learning_rate;
    - grad_norm of the trained parameters before clipping, skipped, skipped_in_a_row.
    """
    rate = learning_rate(optimiser, steps=steps)

    def train_step(
        state: TrainState, batch: Batch, tables: Tables
    ) -> tuple[TrainState, dict[str, Array]]:
        values = scheduled_values(objective.loss, state.step, steps=steps)
        loss, totals, gradient = mean_gradient(
            objective,
            state.params,
            batch,
            values=values,
            microbatches=microbatches,
            tables=tables,
        )
        if places is not None:
            # Else every device would sum whole gradients and then keep its share.
            gradient = jax.lax.with_sharding_constraint(gradient, places.params)
        now = jnp.float32(rate(state.step + 1))  # from 1, because the rate of step 0 is 0
        norm = optax.tree.norm(TrainedPart(gradient, freeze=optimiser.freeze).select(gradient))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        state = updated_state(state, gradient, rate=now, finite=finite, config=optimiser)
        return state, {
            "loss": loss,
            **means(totals, objective.loss.divergence),
            **reported_values(objective.loss, values),
            "grad_norm": norm,
            "learning_rate": now,
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        }

    out, mesh = None, objective.execution.mesh
    if mesh is not None and places is not None:
        out = (places, NamedSharding(mesh, PartitionSpec()))
    return TrainStep(jax.jit(train_step, donate_argnums=0, out_shardings=out), tables)


def updated_state(
    state: TrainState,
    gradient: Parameters,
    *,
    rate: Float[Array, ""],
    finite: Bool[Array, ""],
    config: Optimiser,
) -> TrainState:
    """The state after an update with `gradient` at learning rate `rate`.

    If `finite` is false the update is skipped: parameters and moments stay. The new weights are not
    checked here, because the choice could then only be made after a second pass over all of them,
    which doubles the time of the update. Weights that overflow make the next loss non-finite, and
    are never saved.
    """
    direction, moments = make_optimiser(config).update(gradient, state.moments, state.params)
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


def mean_gradient(
    objective: Objective,
    params: Parameters,
    batch: Batch,
    *,
    values: ScheduledValues,
    microbatches: int = 1,
    tables: Tables = NO_TABLES,
) -> tuple[Float[Array, ""], Totals, Parameters]:
    """The mean loss over the counted tokens of the whole batch, its parts, and the gradient."""
    total = jnp.maximum(jnp.sum(batch["loss_mask"]), 1).astype(jnp.float32)
    per_pair = positions_per_pair(objective.loss, batch)

    def mean_loss(params, piece):
        value, totals = batch_sums(
            objective, params, piece, values=values, tables=tables, per_pair=per_pair
        )
        return value / total, totals

    value_and_gradient = jax.value_and_grad(mean_loss, has_aux=True)
    if microbatches == 1:
        (value, totals), gradient = value_and_gradient(params, batch)
        return value, totals, gradient

    def piece(x):  # Rows at a stride, so that each device keeps its rows.
        return jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0)

    def add(carry, piece):
        (value, totals), gradient = value_and_gradient(params, piece)
        return jax.tree.map(jnp.add, carry, (value, totals, gradient)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    start = (jnp.float32(0), zero_totals(objective.loss), zeros)
    sums, _ = jax.lax.scan(add, start, jax.tree.map(piece, batch))
    return sums
