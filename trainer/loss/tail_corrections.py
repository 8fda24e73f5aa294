"""Corrections that the shape of the teacher's tail adds to the KL of `tail = "bucket"`.

The bucket is the forward KL with the tail as one category: it knows the tail's mass t, but not how
the mass is spread over tokens. Tail draws or a prior describe that shape by a measure ρ over the
tail's tokens, which adds
    Σ_v ρ_v [log(p_v/t) − log(q_v/τ)],   w = Σ_v ρ_v,
with τ the student's mass of the tail. Its gradient in a tail token's logit is β·(w·q_v/τ − ρ_v).
Draws: ρ = Σ_i ω_i δ_{v_i}, which is right on average (the bucket is the control variate).
Prior: ρ = p = t·π̃, the same shape π̃ at every position. Then w = t, so that the correction cancels
the bucket's share of the gradient and β·(q_v − t·π̃_v) remains.
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

LOG_PRIOR_FLOOR = -60.0
"""Lower clamp on log π, so that its exponential and the reciprocal of that fit float32. If all of a
position's tail is clamped, its prior is uniform. Sums with any token above the clamp are unchanged
in float32."""

MIN_TAIL_SHARE = 1 / 16
"""If a tail's share of π is smaller, subtraction loses more than four bits."""


class TailCorrection(NamedTuple):
    """The correction of n positions, and the measure ρ that it comes from."""

    value: Float[Array, " n"]
    """The addend to the KL, in nats."""
    mass: Float[Array, " n"]
    """w = Σ_v ρ_v."""
    drawn: Float[Array, "n m"] | None = None
    """ω of each tail draw; 0 where there is no draw."""
    density: Float[Array, " n"] | None = None
    """ρ_v/π_v, which is the same for all tokens of a tail."""

    def scaled(self, factor: Float[Array, " n"]) -> TailCorrection:
        """All fields times a factor for each position."""
        return jax.tree.map(lambda x: x * factor.reshape(-1, *[1] * (x.ndim - 1)), self)


def correction_from_draws(
    view: StudentView, targets: BatchTargets, teacher: TeacherCategories, *, beta: Float[Array, ""]
) -> TailCorrection:
    """The correction from tail draws v_i of a proposal r, with ω_i = p(v_i) / (m·r(v_i)).

    On average ρ is the teacher's tail. ValueError if `targets` has no draws.
    """
    logprobs, logweights = targets.tail_logprobs, targets.tail_logweights
    if view.drawn is None or logprobs is None or logweights is None:
        raise ValueError('tail = "sampled" needs tail draws: targets.tail_ids is None')
    # An unscored position has no tail, even if its record holds draws.
    there = jnp.isfinite(logprobs) & jnp.isfinite(logweights)
    there &= jnp.isfinite(teacher.tail_logmass)[:, None]
    # The double where: a missing draw is −inf, and −inf − (−inf) is NaN.
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
    """log π at β for each id, interpolated linearly between the nodes at `BETAS`.

    π sums to one over the vocabulary; log π is at least `LOG_PRIOR_FLOOR`.
    """
    # The share of each node: 1 at its own β, falling to 0 at its neighbours' β.
    shares = jnp.stack([jnp.interp(beta, jnp.asarray(BETAS), row) for row in jnp.eye(len(BETAS))])
    log_prior = jnp.sum(shares[:, None] * nodes.astype(jnp.float32), axis=0)
    return jnp.maximum(log_prior - jax.nn.logsumexp(log_prior), LOG_PRIOR_FLOOR)


def correction_from_prior(
    view: StudentView,
    teacher: TeacherCategories,
    log_prior: Float[Array, " here"],
    *,
    beta: Float[Array, ""],
    vocabulary: Vocabulary,
) -> TailCorrection:
    """The correction from a prior: p_v = t·π_v/Π over the tail, where Π is the tail's share of π.

    `log_prior` is log π of this device's columns.
    """
    share, cross = _prior_sums(view, log_prior, beta=beta, vocabulary=vocabulary)
    t = jnp.exp(teacher.logp[:, -1])
    has_tail = share > 0
    safe = jnp.where(has_tail, share, 1.0)
    kl = cross / safe - jnp.log(safe) + jnp.where(has_tail, view.tail_soft, 0.0)
    return TailCorrection(
        value=t * kl,
        mass=jnp.where(has_tail, t, 0.0),
        density=jnp.where(has_tail, t / safe, 0.0),
    )


def _prior_sums(
    view: StudentView,
    log_prior: Float[Array, " here"],
    *,
    beta: Float[Array, ""],
    vocabulary: Vocabulary,
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Π = Σ π_v and Σ π_v (log π_v − β·logit_v) over each position's tail.

    The cheap way takes sums over the vocabulary minus sums over the stored tokens. It cancels if
    the stored tokens hold nearly all of π. A chunk with such a position sums over masked tails.
    """
    if view.expected is None:
        raise ValueError("summarise_logits was called without log_prior")
    pi, here = jnp.exp(log_prior), view.columns < log_prior.shape[0]
    # Padding columns have π = 0 and log π = −inf, but 0·(−inf) is NaN.
    log_prior = jnp.where(pi > 0, log_prior, 0.0)
    there = jnp.isfinite(view.head) & here
    log_head = log_prior.at[view.columns].get(mode="fill", fill_value=0.0)
    head = jnp.where(there, jnp.exp(log_head), 0.0)
    of_head = head * (log_head - beta * jnp.where(there, view.head, 0.0))
    share = jnp.sum(pi) - jnp.sum(head, axis=-1)
    cross = jnp.sum(pi * log_prior) - beta * view.expected - jnp.sum(of_head, axis=-1)

    def over_masked_tails():
        in_tail = ~jnp.isneginf(view.tail)
        each = pi * (log_prior - beta * jnp.where(in_tail, view.tail, 0.0))
        shares = jnp.sum(jnp.where(in_tail, pi, 0.0), axis=-1)
        return shares, jnp.sum(jnp.where(in_tail, each, 0.0), axis=-1)

    # All devices that share a vocabulary take the same branch, and no branch communicates.
    enough = jnp.all(vocabulary.sum_over_devices(share) > MIN_TAIL_SHARE)
    return vocabulary.sum_both_over_devices(
        *jax.lax.cond(enough, lambda: (share, cross), over_masked_tails)
    )


def dense_teacher_logp(
    view: StudentView,
    teacher: TeacherCategories,
    log_prior: Float[Array, " here"],
    *,
    vocabulary: Vocabulary,
) -> Float[Array, "n here"]:
    """log p of every token of this device, with the tail spread as π says.

    For divergences other than forward KL, which have no shortcut for this tail.
    """
    # The tail is masked: 1 − Σ_K π cancels to nothing if the stored tokens hold all of π.
    in_tail = ~jnp.isneginf(view.tail)
    share = vocabulary.sum_over_devices(
        jnp.sum(jnp.where(in_tail, jnp.exp(log_prior), 0.0), axis=-1)
    )
    level = teacher.logp[:, -1] - jnp.log(jnp.where(share > 0, share, 1.0))
    return set_columns(level[:, None] + log_prior, view.columns, teacher.logp[:, :-1])
