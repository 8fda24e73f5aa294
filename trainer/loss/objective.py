"""The loss of a whole batch: the fused head's sums plus the terms that compare layers.

`Objective` is the static part of the loss: a compiled program depends on it. What may change
between updates (batch, parameters, schedule values, tables) is passed as arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from decant.models.mesh.execution import WITHOUT_MESH, Execution
from decant.schemas.targets.unmatched import Partners
from decant.served_losses import Divergence
from decant.trainer.loss.attention_maps import pair_count
from decant.trainer.loss.batch_fields import Batch
from decant.trainer.loss.chunk_loss import HeadSums, Recipe
from decant.trainer.loss.frozen import joined
from decant.trainer.loss.fused_head import distillation_loss
from decant.trainer.loss.layer_pairs import NO_PAIRS, Pairs
from decant.trainer.loss.layer_terms import Matrices, TermSums, term_sums
from decant.trainer.loss.projections import PROJECTIONS, Parameters, without_projections
from decant.trainer.loss.settings import Loss
from decant.trainer.loss.sketches import SketchTables
from decant.trainer.loss.targets import BatchTargets

ScheduledValues = dict[str, Array]
"""α, T and each λ of one update, named as in `Loss.schedules`."""


@dataclass(frozen=True)
class Objective:
    """Everything that the loss of a batch is compiled for. Hashable, for `jax.jit`."""

    graph: nnx.GraphDef
    """The student without its parameters."""
    loss: Loss
    vocabulary: int
    """Ids of the tokenizer. A checkpoint may pad its unembedding with more columns, which get no
    probability."""
    bound: bool = False
    """For judging: see `Recipe.bound`."""
    pairs: Pairs = NO_PAIRS
    """The layers that the terms of `loss` compare."""
    execution: Execution = WITHOUT_MESH


class Tables(NamedTuple):
    """Arrays that every update of a run reads beside its batch."""

    # Arguments of the compiled update: as constants they would add megabytes to its program.
    prior: Float[Array, "nodes vocab"] | None = None
    """The tail prior at the nodes of `BETAS`, for tail = "prior"."""
    sketch: SketchTables | None = None
    """For tail = "sketch"."""
    partners: Partners | None = None
    """For divergence = "gold"."""
    directions: Matrices | None = None
    """Principal directions by signal, for the pairs with `directions`."""
    frozen: Parameters | None = None
    """The student's frozen arrays, of which `params` then has none."""


NO_TABLES = Tables()


class Totals(NamedTuple):
    """Sums over the counted positions of a batch."""

    head: HeadSums
    terms: TermSums


def scheduled_values(loss: Loss, step: Int[Array, ""] | int, *, steps: int) -> ScheduledValues:
    """α, T and each λ of the update that follows `step` others, in a run of `steps` updates."""
    return {name: schedule.at(step, steps=steps) for name, schedule in loss.schedules.items()}


def reported_values(loss: Loss, values: ScheduledValues) -> ScheduledValues:
    """The values that an update reports: α, T, and each λ that changes over the run."""
    moving = {name for name, schedule in loss.schedules.items() if schedule.end is not None}
    return {name: values[name] for name in values if name in {"alpha", "temperature"} | moving}


def batch_sums(
    objective: Objective,
    params: Parameters,
    batch: Batch,
    *,
    values: ScheduledValues,
    tables: Tables = NO_TABLES,
    per_pair: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Totals]:
    """The loss summed over a batch's counted positions, and its parts.

    `per_pair` is `positions_per_pair` of the whole batch, of which `batch` may be a microbatch.
    """
    loss, pairs = objective.loss, objective.pairs
    assert loss.tail is not None or loss.divergence == "on_policy", "choose_tail comes first"
    own = without_projections(params)
    model = nnx.merge(objective.graph, joined(own, tables.frozen or {}))
    hidden, states = model(
        batch["tokens"],
        batch["segment_ids"],
        batch["positions"],
        hidden_layers=pairs.hidden_layers,
        execution=objective.execution,
    )
    targets = BatchTargets.of(batch, loss.divergence)
    value, head = distillation_loss(
        hidden,
        model.unembedding(),
        targets,
        temperature=values["temperature"],
        alpha=values["alpha"],
        prior=tables.prior,
        sketch=tables.sketch,
        partners=tables.partners,
        recipe=Recipe(
            loss.divergence,
            loss.mix,
            loss.tail,
            loss.chunk_tokens,
            softcap=model.config.final_softcap,
            frozen_head=tables.frozen is not None,
            bound=objective.bound,
            clip=loss.clip,
            anchor=loss.anchor,
        ),
        vocabulary=objective.vocabulary,
        mesh=objective.execution.mesh,
    )
    matrices = {**params.get(PROJECTIONS, {}), **(tables.directions or {})}
    compared = {**batch, "loss_mask": taught_positions(batch, loss.divergence)}
    terms = term_sums(
        model, states, compared, loss=loss, pairs=pairs, matrices=matrices, per_pair=per_pair
    )
    weights = [values[f"{name}.weight"] for name in loss.terms]
    for weight, term in zip(weights, (*terms.hidden, *terms.attention), strict=True):
        value += weight * term
    return value, Totals(head, terms)


def taught_positions(
    batch: Batch, divergence: Divergence = "forward_kl"
) -> Bool[Array, "rows position"]:
    """Counted positions with a teacher's targets of a loss with this `divergence`.

    Rows of a cache without a teacher's targets have no teacher's states either.
    """
    return BatchTargets.of(batch, divergence).taught


def positions_per_pair(loss: Loss, batch: Batch) -> Float[Array, ""] | None:
    """Makes sums over pairs of tokens divide like sums over positions, see `pair_count`.

    A sum times this number, divided by the batch's positions, is the sum divided by its pairs. None
    if no term has scale = "pairs".
    """
    if all(term.scale != "pairs" for term in loss.attention):
        return None
    taught = taught_positions(batch, loss.divergence)
    return jnp.sum(taught) / jnp.maximum(pair_count(batch["segment_ids"], taught), 1)


def zero_totals(loss: Loss) -> Totals:
    """Totals of no positions."""
    zero = jnp.float32(0)
    terms = TermSums((zero,) * len(loss.hidden), (zero,) * len(loss.attention))
    return Totals(HeadSums.zero(), terms)


def means(totals: Totals, divergence: Divergence = "forward_kl") -> dict[str, Array]:
    """The sums as metrics: means over positions, and `tokens`, the number of positions."""
    sums, terms = totals
    count, taught = jnp.maximum(sums.count, 1), jnp.maximum(sums.taught, 1)
    metrics = {"ce_loss": sums.ce / count, "tokens": sums.count}
    names = {"kl_loss": sums.kl, "agreement": sums.agreement}
    if divergence == "on_policy":
        names = {name: getattr(sums, name) for name in ("advantage", "ratio", "clipped")}
    metrics |= {name: value / taught for name, value in names.items()}
    kinds = {"hidden_state_loss": terms.hidden, "attention_loss": terms.attention}
    return metrics | {
        name: sum(values) / len(values) / taught for name, values in kinds.items() if values
    }
