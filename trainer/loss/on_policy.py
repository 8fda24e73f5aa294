"""The loss `on_policy`: a policy gradient on tokens that a student wrote, rewarded by the teacher.

For a written token y let p, q and w be the probabilities that the teacher, the student and the
writer give it (all at T = 1), ε = `loss.clip` and λ = `loss.anchor`:

    A = log p − log q, a constant      ρ = q / w      d = log w − log q
    loss = −min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A) + λ·(e^d − 1 − d)

If y is drawn from q and w = q, A is on average −KL(q ‖ p), the first part has on average the
gradient of KL(q ‖ p), and the second part is on average KL(q ‖ w). Sources: docs/on-policy.md.

∂loss/∂log q = −ρ·A + λ·(1 − e^d), without the first part where clipping has fixed it. In the logits
that is −∂loss/∂log q times the gradient of the cross-entropy with y.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

MOST = 20.0
"""Largest |log ρ| that is computed with, so that no exponential overflows."""


class PolicyTerms(NamedTuple):
    """The loss of n written tokens, its gradient and what is logged of it."""

    value: Float[Array, " n"]
    weight: Float[Array, " n"]
    """The gradient in the logits is this times that of the cross-entropy with the token."""
    advantage: Float[Array, " n"]
    """A, in nats."""
    ratio: Float[Array, " n"]
    """ρ."""
    clipped: Float[Array, " n"]
    """1 where clipping has fixed the first part of the loss, so that it has no gradient."""


def policy_terms(
    student: Float[Array, " n"],
    teacher: Float[Array, " n"],
    writer: Float[Array, " n"],
    *,
    clip: float,
    anchor: float,
) -> PolicyTerms:
    """The terms of n tokens from the natural logs of the probabilities that each gave them.

    All must be finite.
    """
    advantage = teacher - student
    log_ratio = jnp.clip(student - writer, -MOST, MOST)
    ratio = jnp.exp(log_ratio)
    within = jnp.clip(ratio, 1 - clip, 1 + clip)
    free = ratio * advantage <= within * advantage
    value, weight = -jnp.minimum(ratio * advantage, within * advantage), ratio * advantage * free
    if anchor:
        back = jnp.exp(-log_ratio)
        value += anchor * (back - 1 + log_ratio)
        weight += anchor * (back - 1)
    return PolicyTerms(value, weight, advantage, ratio, 1.0 - free)
