"""The loss `on_policy` of tokens that a student wrote; `trainer/loss/on_policy.py` explains it."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

MOST = 20.0
"""Largest |log ρ| that is computed with, so that no exponential overflows."""


class PolicyTerms(NamedTuple):
    """The loss of n written tokens, its gradient and what is reported of it."""

    value: Float[Tensor, " n"]
    weight: Float[Tensor, " n"]
    """The gradient in the logits is this times that of the cross-entropy with the token."""
    advantage: Float[Tensor, " n"]
    """A = log p − log q, in nats."""
    ratio: Float[Tensor, " n"]
    """ρ = q / w."""
    clipped: Float[Tensor, " n"]
    """1 where clipping has fixed −min(ρA, clip(ρ)A), so that it has no gradient."""


def policy_terms(
    student: Float[Tensor, " n"],
    teacher: Float[Tensor, " n"],
    writer: Float[Tensor, " n"],
    *,
    clip: float,
    anchor: float,
) -> PolicyTerms:
    """The terms of n tokens from the finite natural logs of the probabilities of each."""
    advantage = teacher - student
    log_ratio = (student - writer).clamp(-MOST, MOST)
    ratio = log_ratio.exp()
    within = ratio.clamp(1 - clip, 1 + clip) * advantage
    free = (ratio * advantage <= within).to(ratio.dtype)
    value, weight = -(ratio * advantage).minimum(within), ratio * advantage * free
    if anchor:
        back = (-log_ratio).exp()
        value = value + anchor * (back - 1 + log_ratio)
        weight = weight + anchor * (back - 1)
    return PolicyTerms(value, weight, advantage, ratio, 1 - free)
