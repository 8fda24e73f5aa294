"""One chunk's logits, reduced to the few numbers that the loss needs, and the way back.

A stored column is the column of one of the k stored ids; all other columns are the tail. The loss
sees the tail through a few sums, so the gradient in the logits is made from the gradients in these
sums (`logits_gradient`), with one or two passes over the vocabulary for any loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decant.torch.settings import Settings
from decant.torch.sketches import SketchShape
from decant.torch.tail_prior import Prior
from decant.torch.targets import Targets, set_stored

TailShape = Prior | SketchShape
"""A distribution over each position's tail."""


class StudentView(NamedTuple):
    """The logits of n positions. β = 1/T."""

    head: Float[Tensor, "n k"]
    """Logits of the stored columns; −inf where no target is stored."""
    label: Float[Tensor, " n"]
    """Logit of the label."""
    tail_soft: Float[Tensor, " n"]
    """log Σ_tail exp(β·logit); −inf if the tail is empty."""
    tail_hard: Float[Tensor, " n"]
    """log Σ_tail exp(logit)."""
    drawn: Float[Tensor, "n m"] | None
    """Logits of the tail draws, or of the ids that have counts."""
    expected: Float[Tensor, " n"] | None
    """Σ_tail π_v·logit_v for a tail shape π."""
    agrees: Bool[Tensor, " n"]
    """Whether the likeliest token is the teacher's."""

    def leaves(self) -> tuple[StudentView, list[Tensor]]:
        """The view with fields to differentiate in, and these fields in order."""
        fields = [x if x is None else x.detach().requires_grad_() for x in self[:-1]]
        return StudentView._make([*fields, self.agrees]), [x for x in fields if x is not None]

    def like(self, gradients: list[Tensor | None]) -> StudentView:
        """The gradients of `leaves` by field; zero where the loss did not use a field."""
        rest = iter(gradients)
        named = [None if x is None else _zero_if_none(next(rest), x) for x in self[:-1]]
        return StudentView._make([*named, self.agrees])


@dataclass
class Exponentials:
    """What `logits_gradient` needs again: both [n, vocab], zero in the stored columns."""

    hard: Tensor
    """exp(logit − highest)"""
    soft: Tensor
    """exp(β·(logit − highest)); the same tensor at T = 1."""


def summarise_logits(
    logits: Float[Tensor, "n vocab"],
    targets: Targets,
    *,
    settings: Settings,
    shape: TailShape | None,
) -> tuple[StudentView, Exponentials]:
    """The view of float32 `logits`, which are overwritten.

    The tail is masked: 1 − Σ q over the stored ids would cancel to nothing for a small tail.
    """
    beta = settings.beta
    head = logits.gather(1, targets.ids).where(targets.stored, -torch.inf)
    label = logits.gather(1, targets.labels[:, None])[:, 0]
    drawn = None if targets.drawn_ids is None else logits.gather(1, targets.drawn_ids)
    teachers = targets.likeliest
    likeliest = logits.gather(1, teachers.clamp(min=0)[:, None])[:, 0]
    agrees = targets.taught & (teachers >= 0) & (likeliest >= logits.amax(-1))
    expected = None
    if shape is not None:
        expected = shape.expected(set_stored(logits, targets, 0.0))
    tail = set_stored(logits, targets, -torch.inf)
    highest = tail.amax(-1)
    top = highest.where(torch.isfinite(highest), 0.0)
    below = tail.sub_(top[:, None])
    soft = None if beta == 1 else torch.mul(below, beta).exp_()
    hard = below.exp_()
    soft = hard if soft is None else soft
    view = StudentView(
        head=head,
        label=label,
        tail_soft=beta * top + soft.sum(-1).log(),
        tail_hard=top + hard.sum(-1).log(),
        drawn=drawn,
        expected=expected,
        agrees=agrees,
    )
    return view, Exponentials(hard, soft)


def logits_gradient(
    gradient: StudentView,
    exponentials: Exponentials,
    targets: Targets,
    *,
    settings: Settings,
    shape: TailShape | None,
) -> Float[Tensor, "n vocab"]:
    """The gradient in the logits from that in each field of the view; overwrites `exponentials`."""
    hard, soft = exponentials.hard, exponentials.soft
    by_soft = _over(settings.beta * gradient.tail_soft, soft.sum(-1))
    by_hard = _over(gradient.tail_hard, hard.sum(-1))
    if soft is hard:
        out = hard.mul_((by_soft + by_hard)[:, None])
    else:
        out = hard.mul_(by_hard[:, None]).addcmul_(soft, by_soft[:, None])
    if shape is not None and gradient.expected is not None:
        out = shape.add_to(out, gradient.expected, targets)
    out.scatter_add_(1, targets.ids, gradient.head.where(targets.stored, 0.0))
    if targets.drawn_ids is not None and gradient.drawn is not None:
        out.scatter_add_(1, targets.drawn_ids, gradient.drawn)
    return out.scatter_add_(1, targets.labels[:, None], gradient.label[:, None])


def _over(gradient: Float[Tensor, " n"], total: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """gradient / total; zero if the tail is empty."""
    there = total > 0
    return (gradient / total.where(there, 1.0)).where(there, 0.0)


def _zero_if_none(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
