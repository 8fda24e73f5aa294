"""Distances between sorted probabilities, for a teacher and a student with different vocabularies.

Universal Logit Distillation (Boizard et al. 2024, arXiv 2402.12030) compares the likeliest token of
the teacher with the likeliest of the student, the second with the second, and so on, whichever
tokens they are:
    ULD = Σ_i |p_(i) − q_(i)|,   p_(1) ≥ p_(2) ≥ …,   the shorter list filled up with 0.

A cache stores the k largest p and the mass t of the rest. With R the student's mass outside of its
k largest,
    Σ_{i ≤ k} |p_(i) − q_(i)| + |t − R|
is a lower bound of ULD, and equal to it if t = 0: the sum of differences is at least the difference
of sums.

GOLD takes this distance over the tokens without a partner in the other vocabulary. There the mass
of the teacher's rest is only known to be between 0 and t. With R the student's mass of such tokens
outside of the compared ranks, |t − R| becomes max(0, R − t), the least that it can be.

    ULD's part of the loss:  α·T·ULD
    GOLD's:  α·[w·T²·JSD + (1 − w)·T·ULD of the tokens without a partner]
JSD is over the stored tokens with a partner, and all others as one category; w is the share of the
teacher's vocabulary that has a partner, as in TRL's GOLD, which however has no factors of T and no
category of all others.

With s_v = ∂D/∂q_v (1 or −1 by the sign of the difference, 0 for tokens outside of the sum), the
gradient in the student's logit of v is β·q_v·(s_v − Σ_u q_u·s_u). Ranks count as constant, which
they are almost everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decant.models.mesh.top_k import top_k
from decant.models.mesh.vocabulary import Vocabulary
from decant.schemas.targets.unmatched import Partners
from decant.trainer.loss.divergences import teacher_categories
from decant.trainer.loss.student_view import local_columns, set_columns
from decant.trainer.loss.targets import BatchTargets


class SortedDistance(NamedTuple):
    """The distance of n positions at one temperature, and its gradient."""

    value: Float[Array, " n"]
    gradient: Float[Array, "n here"]
    """With respect to this device's logits."""


def distance_by_rank(
    logits: Float[Array, "n here"],
    log_normaliser: Float[Array, " n"],
    targets: BatchTargets,
    *,
    temperature: Float[Array, ""],
    vocabulary: Vocabulary,
    partners: Partners | None = None,
) -> tuple[Float[Array, ""] | float, SortedDistance]:
    """The distance's weight in the loss, and the distance between sorted probabilities.

    Without `partners` that is ULD over both vocabularies, with weight 1. With them it is that over
    the tokens without a partner, with weight 1 − w.
    """
    beta = 1 / temperature
    teacher = teacher_categories(
        jnp.where(targets.stored, targets.topk_logprobs, -jnp.inf),
        jnp.where(targets.taught[:, None], targets.tail_logmass, -jnp.inf),
        beta=beta,
        tail="bucket",
    )
    logp, rest = teacher.logp[:, :-1], jnp.exp(teacher.logp[:, -1])
    if targets.unmatched is not None:
        unmatched = beta * targets.unmatched - teacher.log_normaliser[:, None]
        # The stored mass of the rest includes that of these tokens.
        rest = jnp.maximum(rest - jnp.sum(jnp.exp(unmatched), axis=-1), 0.0)
        both = jnp.concatenate([logp, unmatched], axis=-1)
        logp = unmatched if partners else jax.lax.top_k(both, logp.shape[-1])[0]
    return (1 - partners.share) if partners else 1.0, sorted_distance(
        logits,
        log_normaliser,
        logp,
        rest,
        beta=beta,
        vocabulary=vocabulary,
        compared=None if partners is None else partners.alone > 0,
    )


def sorted_distance(
    logits: Float[Array, "n here"],
    log_normaliser: Float[Array, " n"],
    logp: Float[Array, "n k"],
    rest: Float[Array, " n"],
    *,
    beta: Float[Array, ""],
    vocabulary: Vocabulary,
    compared: Bool[Array, " here"] | None = None,
) -> SortedDistance:
    """The distance at β = 1/T; see the top of this file.

    `log_normaliser` is log Σ exp(β·logit) over the whole vocabulary. `logp` is the teacher's log p
    of the stored tokens, descending; −inf where none is stored. `rest` is t. `compared` are the
    columns of tokens without a partner, for GOLD; None: all columns are compared, for ULD.
    """
    p, k = jnp.exp(logp), logp.shape[-1]
    among = logits if compared is None else jnp.where(compared, logits, -jnp.inf)
    values, ids = _likeliest(among, k, vocabulary=vocabulary)
    # A rank without a stored probability belongs to the rest; one without a student's token has
    # q = 0 and no column.
    stored, there = p > 0, jnp.isfinite(values)
    here, columns = local_columns(ids, width=logits.shape[-1], vocabulary=vocabulary)
    columns = jnp.where(stored & there & here, columns, logits.shape[-1] + jnp.arange(k))
    q = jnp.where(stored, jnp.exp(beta * values - log_normaliser[:, None]), 0.0)
    every_q = jnp.exp(beta * logits - log_normaliser[:, None])
    whole = jnp.ones_like(rest)
    if compared is not None:
        whole = vocabulary.sum_over_devices(jnp.sum(jnp.where(compared, every_q, 0.0), axis=-1))
    others = jnp.maximum(whole - jnp.sum(q, axis=-1), 0.0)
    excess = others - rest
    if compared is not None:
        excess = jnp.maximum(excess, 0.0)
    slopes, slope_of_rest = jnp.sign(q - p), jnp.sign(excess)
    mean = jnp.sum(q * slopes, axis=-1) + slope_of_rest * others
    each = jnp.broadcast_to(slope_of_rest[:, None], logits.shape)
    if compared is not None:
        each = jnp.where(compared, each, 0.0)
    each = set_columns(each, columns, slopes)
    return SortedDistance(
        value=jnp.sum(jnp.abs(q - p), axis=-1) + jnp.abs(excess),
        gradient=beta * every_q * (each - mean[:, None]),
    )


def _likeliest(
    logits: Float[Array, "n here"], k: int, *, vocabulary: Vocabulary
) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    """The k largest logits and their ids; −inf and id 0 beyond the size of the vocabulary."""
    values, ids = top_k(logits, min(k, vocabulary.size), vocabulary=vocabulary)
    missing = [(0, 0), (0, k - values.shape[-1])]
    return jnp.pad(values, missing, constant_values=-jnp.inf), jnp.pad(ids, missing)
