"""Forward KL at T = 1 to counts: the target is n/N, n of N equally spaced draws.

    KL = Σ_v n_v/N · (−log q_v) − H,   gradient q − n/N
H is the teacher's entropy, from the stored head and tail masses. Gradient and cross-entropy are
right on average, and so is this KL, which can be negative at a position. Without a stored head H is
not known: there the entropy of the counts stands for it, and the KL is that to n/N.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from decant.schemas.targets.targets import tail_logmass_at
from decant.torch.targets import Targets


def kl_to_counts(
    counted: Float[Tensor, "n N"], log_normaliser: Float[Tensor, " n"], targets: Targets
) -> Float[Tensor, " n"]:
    """The KL of each position, 0 without counts.

    `counted` are the student's logits of `targets.count_ids`, `log_normaliser` is log Σ exp(logit)
    over the vocabulary. Differentiable in both.
    """
    assert targets.counts is not None
    shares = targets.counts / targets.counts.sum(-1, keepdim=True).clamp(min=1)
    cross = (shares * (log_normaliser[:, None] - counted)).sum(-1)
    return (cross - _entropy(targets, shares)).where(targets.counts.sum(-1) > 0, 0.0)


def _entropy(targets: Targets, shares: Float[Tensor, "n N"]) -> Float[Tensor, " n"]:
    """The teacher's entropy in nats, or that of the counts if no head is stored."""
    if not targets.ids.shape[-1]:
        return -torch.xlogy(shares, shares).sum(-1)
    logp = targets.logprobs.where(targets.stored, 0.0)
    head = (logp.exp() * logp).where(targets.stored, 0.0).sum(-1)
    return _tail_entropy(targets.tail_logmass) - head


def _tail_entropy(tail_logmass: Float[Tensor, "n nodes"]) -> Float[Tensor, " n"]:
    """−Σ_tail p log p = −exp A(1) · A'(1), in nats at T = 1; 0 for an empty tail."""
    empty = ~torch.isfinite(tail_logmass[:, -1])
    masses = tail_logmass.where(~empty[:, None], 0.0)
    with torch.enable_grad():
        beta = torch.ones_like(masses[:, 0], requires_grad=True)
        mass = tail_logmass_at(masses, beta, xp=torch)
        (slope,) = torch.autograd.grad(mass.sum(), beta)
    mass = mass.detach()
    return (-mass.exp() * slope).where(~empty, 0.0)
