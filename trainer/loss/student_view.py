"""The student's logits of a chunk, taken apart once into the stored columns and the tail.

Where the vocabulary is split over devices (mesh.vocabulary), `logits` are those of this device's
columns. What a position has one of, or k, is the same on all devices; only what has a number for
every column, and sums said to be this device's, are its own.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decant.models.mesh.vocabulary import Vocabulary
from decant.models.numerics import contract
from decant.trainer.loss.targets import BatchTargets


class StudentView(NamedTuple):
    """Logits of n tokens; the tail is masked, because 1 − Σ cancels to nothing."""

    columns: Int[Array, "n k"]
    """Which columns here are stored; outside of all for one that is elsewhere or not there."""
    head: Float[Array, "n k"]
    """Logits of the stored columns, −inf where nothing is stored."""
    label: Float[Array, " n"]
    drawn: Float[Array, "n m"] | None
    """Logits of the drawn tail tokens."""
    expected: Float[Array, " n"] | None
    """Σ_v π_v·logit_v over this device's columns, for a prior π."""
    tail: Float[Array, "n here"]
    """All logits with the stored columns at −inf."""
    highest: Float[Array, " n"]
    """The tail's maximum; −inf if it is empty."""
    top: Float[Array, " n"]
    """The same, that nothing underflows however small the tail's share; 0 if it is empty."""
    tail_hard: Float[Array, " n"]
    """log Σ_tail exp(logit)."""
    tail_soft: Float[Array, " n"]
    """log Σ_tail exp(β·logit)."""
    z_hard: Float[Array, " n"]
    """log Σ exp(logit) over the vocabulary."""
    z_soft: Float[Array, " n"]
    """log Σ exp(β·logit) over the vocabulary."""


def summarise_logits(
    logits: Float[Array, "n here"],
    targets: BatchTargets,
    *,
    beta: Float[Array, ""],
    vocabulary: Vocabulary,
    log_prior: Float[Array, " here"] | None = None,
) -> StudentView:
    """Gather the stored columns and reduce the rest, each pass over the logits once."""
    kept, width = targets.stored, logits.shape[-1]
    here, columns = _local_columns(targets.topk_ids, width=width, vocabulary=vocabulary)
    # An index outside for what is not stored, each another one: scatters drop those.
    columns = jnp.where(kept & here, columns, width + jnp.arange(kept.shape[-1]))
    label, topk, drawn = _gather_logits(logits, targets, vocabulary=vocabulary)
    head = jnp.where(kept, topk, -jnp.inf)
    expected = None
    if log_prior is not None:
        # What is no id has no share of π, but 0·(−inf) is NaN.
        finite = jnp.where(jnp.isneginf(logits), 0.0, logits) if vocabulary.axis else logits
        expected = contract("nv,v->n", finite, jnp.exp(log_prior))
    # −inf, but made of all that was read off the logits: XLA need not keep a copy of them for that.
    read = head if expected is None else head + expected[:, None]
    tail = set_columns(logits, columns, read - jnp.inf)
    highest = vocabulary.max_over_devices(jnp.max(tail, axis=-1))
    top = jnp.where(jnp.isfinite(highest), highest, 0.0)
    below = tail - top[:, None]
    hard, soft = vocabulary.sum_both_over_devices(
        jnp.sum(jnp.exp(below), axis=-1), jnp.sum(jnp.exp(beta * below), axis=-1)
    )
    tail_hard, tail_soft = top + jnp.log(hard), beta * top + jnp.log(soft)
    return StudentView(
        columns=columns,
        head=head,
        label=label,
        drawn=drawn,
        expected=expected,
        tail=tail,
        highest=highest,
        top=top,
        tail_hard=tail_hard,
        tail_soft=tail_soft,
        z_hard=jnp.logaddexp(tail_hard, jax.nn.logsumexp(head, axis=-1)),
        z_soft=jnp.logaddexp(tail_soft, jax.nn.logsumexp(beta * head, axis=-1)),
    )


def subtract_at_ids(
    x: Float[Array, "n here"],
    ids: Int[Array, "n some"] | None,
    values: Float[Array, "n some"] | None,
    *,
    vocabulary: Vocabulary,
) -> Float[Array, "n here"]:
    """`x` with values taken away at ids, which may repeat."""
    if ids is None or values is None:
        return x
    here, columns = _local_columns(ids, width=x.shape[-1], vocabulary=vocabulary)
    columns = jnp.where(here, columns, x.shape[-1])
    return x.at[jnp.arange(len(ids))[:, None], columns].add(-values, mode="drop")


def _gather_logits(
    logits: Float[Array, "n here"], targets: BatchTargets, *, vocabulary: Vocabulary
) -> tuple[Float[Array, " n"], Float[Array, "n k"], Float[Array, "n m"] | None]:
    """Logits of labels, stored ids and draws, wherever their columns are: one sum for all."""
    wanted = [targets.labels[:, None], targets.topk_ids]
    wanted += [] if targets.tail_ids is None else [targets.tail_ids]
    here, columns = _local_columns(
        jnp.concatenate(wanted, axis=-1), width=logits.shape[-1], vocabulary=vocabulary
    )
    found = jnp.take_along_axis(logits, columns, axis=-1)
    if vocabulary.axis:
        found = vocabulary.sum_over_devices(jnp.where(here, found, 0.0))
    label, topk, drawn = jnp.split(found, [1, 1 + targets.topk_ids.shape[-1]], axis=-1)
    return label[:, 0], topk, None if targets.tail_ids is None else drawn


def _local_columns(
    ids: Int[Array, "n some"], *, width: int, vocabulary: Vocabulary
) -> tuple[Bool[Array, "n some"], Int[Array, "n some"]]:
    """Whether each id's column is this device's, and its number, or some other here."""
    columns = ids - vocabulary.first_id(width)
    here = (columns >= 0) & (columns < width)
    return here, jnp.where(here, columns, 0)


def set_columns(
    x: Float[Array, "n here"],
    columns: Int[Array, "n k"],
    values: Float[Array, "n k"] | float,
) -> Float[Array, "n here"]:
    """`x` with `values` in its stored columns."""
    rows = jnp.arange(len(x))[:, None]
    return x.at[rows, columns].set(values, mode="drop", unique_indices=True)
