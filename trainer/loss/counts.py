"""Forward KL at T = 1 to counts: the target is n/N, n of N equally spaced draws.

    KL = Σ_v n_v/N · (−log q_v) − H,   gradient q − n/N
H is the teacher's entropy, from the stored head and tail masses. Gradient and cross-entropy are
right on average, and so is this KL, which can be negative at a position. A cache with counts and no
top-k does not tell H: there the entropy of the counts stands for it, and the KL is that to n/N.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decant.schemas.targets.targets import tail_logmass_at
from decant.trainer.loss.divergences import TeacherCategories
from decant.trainer.loss.student_view import StudentView
from decant.trainer.loss.tail_corrections import TailCorrection
from decant.trainer.loss.targets import BatchTargets


def whole_as_tail(view: StudentView, targets: BatchTargets) -> TeacherCategories:
    """The one category of a distribution without a stored head: all of it, log p = 0."""
    nothing = jnp.where(targets.taught, 0.0, -jnp.inf)
    return TeacherCategories(nothing[:, None], jnp.zeros_like(view.z_soft), nothing)


def correction_from_counts(view: StudentView, targets: BatchTargets) -> TailCorrection:
    """The correction to the KL of `whole_as_tail`, which is 0. ValueError without counts."""
    shares = _shares(targets)
    cross = jnp.sum(shares * (view.z_soft[:, None] - _counted(view)), axis=-1)
    taught = jnp.any(shares > 0, axis=-1)
    return TailCorrection(
        value=jnp.where(taught, cross - _entropy(targets, shares), 0.0),
        mass=taught.astype(jnp.float32),
        drawn=shares,
    )


def _shares(targets: BatchTargets) -> Float[Array, "n N"]:
    """n/N of each id; all 0 at a position without counts."""
    if targets.counts is None or targets.count_ids is None:
        raise ValueError('tail = "counts" needs counts: targets.counts is None')
    counts = jnp.where(targets.mask[:, None], targets.counts, 0).astype(jnp.float32)
    return counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1)


def _counted(view: StudentView) -> Float[Array, "n N"]:
    assert view.counted is not None
    return view.counted


def _entropy(targets: BatchTargets, shares: Float[Array, "n N"]) -> Float[Array, " n"]:
    """The teacher's entropy in nats, or that of the counts if no head is stored."""
    if not targets.topk_ids.shape[-1]:
        return -jnp.sum(shares * jnp.log(jnp.where(shares > 0, shares, 1.0)), axis=-1)
    logp = jnp.where(targets.stored, targets.topk_logprobs, 0.0)
    head = jnp.where(targets.stored, jnp.exp(logp) * logp, 0.0)
    return _tail_entropy(targets.tail_logmass) - jnp.sum(head, axis=-1)


def _tail_entropy(tail_logmass: Float[Array, "n nodes"]) -> Float[Array, " n"]:
    """−Σ_tail p log p = −exp A(1) · A'(1), in nats at T = 1; 0 for an empty tail."""
    empty = ~jnp.isfinite(tail_logmass[:, -1])
    masses = jnp.where(empty[:, None], 0.0, tail_logmass)
    one = jnp.float32(1)
    mass, slope = jax.jvp(lambda beta: tail_logmass_at(masses, beta, xp=jnp), (one,), (one,))
    return jnp.where(empty, 0.0, -jnp.exp(mass) * slope)
