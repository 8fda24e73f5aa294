"""What is known of the tail's inner shape, beyond its mass: tokens drawn from it, or a prior.

Both describe the teacher's tail by a measure ρ over its tokens and add to the forward KL with the
tail as one category ("bucket")
    Σ_v ρ_v [log(p_v/t) − log(q_v/τ)],   w = Σ_v ρ_v,
whose gradient in a tail token's logit is β·(w·q_v/τ − ρ_v). Draws: ρ = Σ_i ω_i δ_{v_i}, which is
right on average (the bucket is the control variate). Prior: ρ = p = t·π̃, the same shape at every
position, so that w = t cancels the bucket's share and what is left is β·(q_v − t·π̃_v).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decant.models.mesh.vocabulary import Vocabulary
from decant.schemas.targets.targets import BETAS
from decant.trainer.loss.divergences import TeacherCategories
from decant.trainer.loss.student_view import StudentView, set_columns
from decant.trainer.loss.targets import BatchTargets

FLOOR = -60.0
"""Least log π: its exponential and that one's inverse are float32 numbers. Whoever has no tail
token above it sees a flat tail; sums with any other token do not notice."""

ENOUGH = 1 / 16
"""Share of π in a tail below which subtracting would lose more than four bits."""


class TailCorrection(NamedTuple):
    """ρ of n positions and what it adds."""

    value: Float[Array, " n"]
    """In nats."""
    mass: Float[Array, " n"]
    """w."""
    drawn: Float[Array, "n m"] | None = None
    """ω of each draw; 0 where there is none."""
    density: Float[Array, " n"] | None = None
    """ρ_v = density · π_v at each tail token."""

    def scaled(self, factor: Float[Array, " n"]) -> TailCorrection:
        """All of it times a number for each position."""
        return jax.tree.map(lambda x: x * factor.reshape(-1, *[1] * (x.ndim - 1)), self)


def correction_from_draws(
    view: StudentView, targets: BatchTargets, teacher: TeacherCategories, *, beta: Float[Array, ""]
) -> TailCorrection:
    """From draws: ω_i = p(v_i) / (m·r(v_i)), on average the teacher's tail."""
    ids, logprobs, logweights = targets[-3:]
    if view.drawn is None or ids is None or logprobs is None or logweights is None:
        raise ValueError('tail = "sampled" needs draws: Targets has no tail_ids')
    # A position that is not scored has no tail, whatever was drawn from it.
    there = jnp.isfinite(logprobs) & jnp.isfinite(logweights)
    there &= jnp.isfinite(teacher.tail_logmass)[:, None]
    # The double where: a draw that is not there is −inf, whose differences are NaN.
    logp = beta * jnp.where(there, logprobs, 0.0)
    weight = logp - teacher.log_normaliser[:, None] + jnp.where(there, logweights, 0.0)
    omega = jnp.where(there, jnp.exp(weight), 0.0)
    log_ratio = logp - teacher.tail_logmass[:, None] - beta * view.drawn + view.tail_soft[:, None]
    return TailCorrection(
        value=jnp.sum(jnp.where(there, omega * log_ratio, 0.0), axis=-1),
        mass=jnp.sum(omega, axis=-1),
        drawn=omega,
    )


def log_prior_at(
    nodes: Float[Array, "nodes vocab"], *, beta: Float[Array, ""] | float
) -> Float[Array, " vocab"]:
    """log π at β: linear between `BETAS`, for each id; sums to one over the vocabulary."""
    # The share of each node: 1 at its own β, falling to 0 at its neighbours'.
    shares = jnp.stack([jnp.interp(beta, jnp.asarray(BETAS), row) for row in jnp.eye(len(BETAS))])
    log_prior = jnp.sum(shares[:, None] * nodes.astype(jnp.float32), axis=0)
    return jnp.maximum(log_prior - jax.nn.logsumexp(log_prior), FLOOR)


def correction_from_prior(
    view: StudentView,
    teacher: TeacherCategories,
    log_prior: Float[Array, " here"],
    *,
    beta: Float[Array, ""],
    vocabulary: Vocabulary,
) -> TailCorrection:
    """From a prior: p_v = t·π_v/Π over the tail, Π the tail's share of π."""
    share, cross = _prior_sums(view, log_prior, beta=beta, vocabulary=vocabulary)
    t = jnp.exp(teacher.logp[:, -1])
    some = share > 0
    safe = jnp.where(some, share, 1.0)
    kl = cross / safe - jnp.log(safe) + jnp.where(some, view.tail_soft, 0.0)
    return TailCorrection(
        value=t * kl, mass=jnp.where(some, t, 0.0), density=jnp.where(some, t / safe, 0.0)
    )


def _prior_sums(
    view: StudentView,
    log_prior: Float[Array, " here"],
    *,
    beta: Float[Array, ""],
    vocabulary: Vocabulary,
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Π = Σ π_v and Σ π_v (log π_v − β·logit_v) over each position's tail.

    What the vocabulary has less what is stored, which costs nothing but cancels where the stored
    tokens are nearly all of π: a chunk with such a position sums over its masked tails instead.
    """
    if view.expected is None:
        raise ValueError("the view was taken without the prior")
    pi, here = jnp.exp(log_prior), view.columns < log_prior.shape[0]
    # Of what is no id: π is 0, and 0·(−inf) is NaN.
    log_prior = jnp.where(pi > 0, log_prior, 0.0)
    there = jnp.isfinite(view.head) & here
    log_head = log_prior.at[view.columns].get(mode="fill", fill_value=0.0)
    head = jnp.where(there, jnp.exp(log_head), 0.0)
    of_head = head * (log_head - beta * jnp.where(there, view.head, 0.0))
    share = jnp.sum(pi) - jnp.sum(head, axis=-1)
    cross = jnp.sum(pi * log_prior) - beta * view.expected - jnp.sum(of_head, axis=-1)

    def masked():
        in_tail = ~jnp.isneginf(view.tail)
        each = pi * (log_prior - beta * jnp.where(in_tail, view.tail, 0.0))
        shares = jnp.sum(jnp.where(in_tail, pi, 0.0), axis=-1)
        return shares, jnp.sum(jnp.where(in_tail, each, 0.0), axis=-1)

    # All devices of a vocabulary take the same way, and none waits for another inside of it.
    enough = jnp.all(vocabulary.sum_over_devices(share) > ENOUGH)
    return vocabulary.sum_both_over_devices(*jax.lax.cond(enough, lambda: (share, cross), masked))


def dense_teacher_logp(
    view: StudentView,
    teacher: TeacherCategories,
    log_prior: Float[Array, " here"],
    *,
    vocabulary: Vocabulary,
) -> Float[Array, "n here"]:
    """log p of every token, for divergences that need each of them."""
    # Π is masked, because 1 − Σ_K π cancels to nothing where the stored tokens are all of π.
    in_tail = ~jnp.isneginf(view.tail)
    share = vocabulary.sum_over_devices(
        jnp.sum(jnp.where(in_tail, jnp.exp(log_prior), 0.0), axis=-1)
    )
    level = teacher.logp[:, -1] - jnp.log(jnp.where(share > 0, share, 1.0))
    return set_columns(level[:, None] + log_prior, view.columns, teacher.logp[:, :-1])
