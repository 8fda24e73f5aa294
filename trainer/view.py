"""The student's logits of a chunk, taken apart once into the stored columns and the tail."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.numerics import contract


class Targets(NamedTuple):
    """What positions are scored against; the label of position t is the token at t + 1."""

    labels: Int[Array, "*position"]
    mask: Bool[Array, "*position"]
    topk_ids: Int[Array, "*position k"]
    topk_logprobs: Float[Array, "*position k"]
    tail_logmass: Float[Array, "*position nodes"]
    tail_ids: Int[Array, "*position m"] | None = None
    """Drawn from the tail, possibly several times; for tail = "sampled" only, as the next two."""
    tail_logprobs: Float[Array, "*position m"] | None = None
    """At T = 1, over the full vocabulary; −inf where there is no draw."""
    tail_logweights: Float[Array, "*position m"] | None = None
    """−log(m·r(v)) for a proposal r over the tail; −inf where there is no draw."""


class StudentView(NamedTuple):
    """Logits of n tokens; the tail is masked, because 1 − Σ cancels to nothing."""

    columns: Int[Array, "n k"]
    """Where to scatter the stored columns; outside the vocabulary where nothing is stored."""
    head: Float[Array, "n k"]
    """Logits of the stored columns, −inf where nothing is stored."""
    label: Float[Array, " n"]
    drawn: Float[Array, "n m"] | None
    """Logits of the drawn tail tokens."""
    expected: Float[Array, " n"] | None
    """Σ_v π_v·logit_v over the vocabulary, for a prior π."""
    tail: Float[Array, "n vocab"]
    """All logits with the stored columns at −inf."""
    top: Float[Array, " n"]
    """The tail's maximum, that nothing underflows however small its share; 0 if it is empty."""
    tail_hard: Float[Array, " n"]
    """log Σ_tail exp(logit)."""
    tail_soft: Float[Array, " n"]
    """log Σ_tail exp(β·logit)."""
    z_hard: Float[Array, " n"]
    """log Σ exp(logit) over the vocabulary."""
    z_soft: Float[Array, " n"]
    """log Σ exp(β·logit) over the vocabulary."""


def take_apart(
    logits: Float[Array, "n vocab"],
    targets: Targets,
    *,
    beta: Float[Array, ""],
    log_prior: Float[Array, " vocab"] | None = None,
) -> StudentView:
    """Gather the stored columns and reduce the rest, each pass over the logits once."""
    kept = stored(targets)
    # An index outside for what is not stored, each another one: scatters drop those.
    outside = logits.shape[-1] + jnp.arange(kept.shape[-1])
    columns = jnp.where(kept, targets.topk_ids, outside)
    head = jnp.where(kept, jnp.take_along_axis(logits, targets.topk_ids, axis=-1), -jnp.inf)
    drawn = None
    if targets.tail_ids is not None:
        drawn = jnp.take_along_axis(logits, targets.tail_ids, axis=-1)
    expected = None
    if log_prior is not None:
        expected = contract("nv,v->n", logits, jnp.exp(log_prior))
    tail = put(logits, columns, -jnp.inf)
    highest = jnp.max(tail, axis=-1)
    top = jnp.where(jnp.isfinite(highest), highest, 0.0)
    below = tail - top[:, None]
    tail_hard = top + jnp.log(jnp.sum(jnp.exp(below), axis=-1))
    tail_soft = beta * top + jnp.log(jnp.sum(jnp.exp(beta * below), axis=-1))
    return StudentView(
        columns=columns,
        head=head,
        label=jnp.take_along_axis(logits, targets.labels[:, None], axis=-1)[:, 0],
        drawn=drawn,
        expected=expected,
        tail=tail,
        top=top,
        tail_hard=tail_hard,
        tail_soft=tail_soft,
        z_hard=jnp.logaddexp(tail_hard, jax.nn.logsumexp(head, axis=-1)),
        z_soft=jnp.logaddexp(tail_soft, jax.nn.logsumexp(beta * head, axis=-1)),
    )


def stored(targets: Targets) -> Bool[Array, "n k"]:
    """Which columns hold a target."""
    # Not where a position is not scored: padding repeats id 0, and scatters promise unique ids.
    return jnp.isfinite(targets.topk_logprobs) & targets.mask[:, None]


def put(
    x: Float[Array, "n vocab"],
    columns: Int[Array, "n k"],
    values: Float[Array, "n k"] | float,
) -> Float[Array, "n vocab"]:
    """`x` with `values` in its stored columns."""
    rows = jnp.arange(len(x))[:, None]
    return x.at[rows, columns].set(values, mode="drop", unique_indices=True)
