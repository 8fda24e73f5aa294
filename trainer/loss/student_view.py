"""One chunk's student logits, reduced to the numbers that the loss and its gradient need.

A stored column is the column of one of the k stored ids; all other columns are the tail. If the
vocabulary is split over devices (`models.mesh.vocabulary`), `logits` are the columns of this device
("here"). Per-position arrays and [n, k] arrays are equal on all devices. Arrays with a vocabulary
axis, and sums marked local, differ between devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from decant.models.mesh.vocabulary import Vocabulary
from decant.models.numerics import contract
from decant.trainer.loss.targets import BatchTargets


class StudentView(NamedTuple):
    """The logits of n positions. β = 1/T."""

    columns: Int[Array, "n k"]
    """Local column of each stored id. Out of range if no target is stored, or the column is on
    another device; scatters drop such indices."""
    head: Float[Array, "n k"]
    """Logits of the stored columns; −inf where no target is stored."""
    label: Float[Array, " n"]
    """Logit of the label."""
    drawn: Float[Array, "n m"] | None
    """Logits of the tail draws."""
    counted: Float[Array, "n N"] | None
    """Logits of the ids with counts."""
    teachers: Float[Array, " n"]
    """Logit of the teacher's likeliest token; arbitrary where there is no target."""
    expected: Float[Array, " n"] | None
    """Local sum Σ_v π_v·logit_v, for a prior π."""
    tail: Float[Array, "n here"]
    """All logits, with −inf in the stored columns."""
    highest: Float[Array, " n"]
    """Maximum of the tail; −inf if the tail is empty."""
    top: Float[Array, " n"]
    """`highest`, or 0 if the tail is empty. It is subtracted before exp, so that a tail with a
    small share does not underflow."""
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
    has_head: bool = True,
) -> StudentView:
    """Gather the stored columns, and reduce the tail in one pass over the logits.

    The tail is masked: 1 − Σ q over the stored ids would cancel to nothing for a small tail.
    Without `has_head` the stored ids are not told apart: the whole vocabulary is the tail.
    """
    teachers = targets.likeliest[:, None]
    if not has_head:
        targets = targets._replace(
            topk_ids=targets.topk_ids[:, :0], topk_logprobs=targets.topk_logprobs[:, :0]
        )
    kept, width = targets.stored, logits.shape[-1]
    here, columns = local_columns(targets.topk_ids, width=width, vocabulary=vocabulary)
    # Out-of-range indices differ from each other, because scatters promise unique indices.
    columns = jnp.where(kept & here, columns, width + jnp.arange(kept.shape[-1]))
    labels, optional = targets.labels[:, None], (targets.tail_ids, targets.count_ids)
    label, own, topk, drawn, counted = _gather_logits(
        logits, (labels, teachers, targets.topk_ids, *optional), vocabulary=vocabulary
    )
    assert label is not None
    assert own is not None
    assert topk is not None
    own = jnp.where(teachers < 0, -jnp.inf, own)  # the student has no such token
    head = jnp.where(kept, topk, -jnp.inf)
    expected = None
    if log_prior is not None:
        # Padding columns have π = 0 and logit −inf, but 0·(−inf) is NaN.
        finite = jnp.where(jnp.isneginf(logits), 0.0, logits) if vocabulary.axis else logits
        expected = contract("nv,v->n", finite, jnp.exp(log_prior))
    # −inf that depends on all values read from `logits`: XLA then needs no copy for the scatter.
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
        label=label[:, 0],
        drawn=drawn,
        counted=counted,
        teachers=own[:, 0],
        expected=expected,
        tail=tail,
        highest=highest,
        top=top,
        tail_hard=tail_hard,
        tail_soft=tail_soft,
        z_hard=_with_head(tail_hard, head),
        z_soft=_with_head(tail_soft, beta * head),
    )


def _with_head(tail: Float[Array, " n"], head: Float[Array, "n k"]) -> Float[Array, " n"]:
    """log(exp(tail) + Σ exp(head)); k may be 0."""
    return jnp.logaddexp(tail, jax.nn.logsumexp(head, axis=-1)) if head.shape[-1] else tail


def set_columns(
    x: Float[Array, "n here"],
    columns: Int[Array, "n k"],
    values: Float[Array, "n k"] | float,
) -> Float[Array, "n here"]:
    """`x` with `values` written at `columns`; columns out of range are dropped."""
    rows = jnp.arange(len(x))[:, None]
    return x.at[rows, columns].set(values, mode="drop", unique_indices=True)


def subtract_at_ids(
    x: Float[Array, "n here"],
    ids: Int[Array, "n ids"] | None,
    values: Float[Array, "n ids"] | None,
    *,
    vocabulary: Vocabulary,
) -> Float[Array, "n here"]:
    """`x` minus `values` at the columns of `ids`, which may repeat. None: `x` unchanged."""
    if ids is None or values is None:
        return x
    here, columns = local_columns(ids, width=x.shape[-1], vocabulary=vocabulary)
    columns = jnp.where(here, columns, x.shape[-1])
    return x.at[jnp.arange(len(ids))[:, None], columns].add(-values, mode="drop")


def _gather_logits(
    logits: Float[Array, "n here"],
    ids: Sequence[Int[Array, "n _"] | None],
    *,
    vocabulary: Vocabulary,
) -> list[Float[Array, "n _"] | None]:
    """Logits of each array of ids (None: None), with one sum over devices for all of them."""
    there = [each for each in ids if each is not None]
    here, columns = local_columns(
        jnp.concatenate(there, axis=-1), width=logits.shape[-1], vocabulary=vocabulary
    )
    gathered = jnp.take_along_axis(logits, columns, axis=-1)
    if vocabulary.axis:
        gathered = vocabulary.sum_over_devices(jnp.where(here, gathered, 0.0))
    edges = np.cumsum([each.shape[-1] for each in there])[:-1].tolist()
    parts = iter(jnp.split(gathered, edges, axis=-1))
    return [None if each is None else next(parts) for each in ids]


def local_columns(
    ids: Int[Array, "n ids"], *, width: int, vocabulary: Vocabulary
) -> tuple[Bool[Array, "n ids"], Int[Array, "n ids"]]:
    """Whether each id's column is on this device, and its local number (0 if it is not)."""
    columns = ids - vocabulary.first_id(width)
    here = (columns >= 0) & (columns < width)
    return here, jnp.where(here, columns, 0)
