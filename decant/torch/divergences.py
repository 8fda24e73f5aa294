"""The loss of positions from few numbers of each: k stored logits and sums over the tail.

`student_view.py` makes these numbers; here autograd gives the gradient in each of them. Formulas
and names are those of `trainer/loss/divergences.py` and `tail_corrections.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from decant.schemas.targets.targets import tail_logmass_at
from decant.torch.counts import kl_to_counts
from decant.torch.on_policy import policy_terms
from decant.torch.settings import Settings
from decant.torch.student_view import StudentView, TailShape
from decant.torch.targets import Targets, set_stored


class Parts(NamedTuple):
    """Values of n positions, without gradients."""

    loss: Float[Tensor, " n"]
    """α·T²·D + (1 − α)·CE, whose sum is the loss."""
    kl: Float[Tensor, " n"]
    """Forward KL at T in nats, as the setting `tail` estimates it; 0 where no target is stored."""
    kl_bound: Float[Tensor, " n"]
    """The same KL with the tail as one category: a lower bound."""
    ce: Float[Tensor, " n"]
    """Cross-entropy with the label, at T = 1."""
    agreement: Float[Tensor, " n"]
    """1 where the student's likeliest token is the teacher's."""
    taught: Float[Tensor, " n"]
    """1 where the teacher's targets are stored. Elsewhere the label alone is learned from."""
    advantage: Float[Tensor, " n"]
    """This and the next two are for "on_policy" (`PolicyTerms`), and 0 for others and elsewhere;
    KLs and agreement are 0 for "on_policy"."""
    ratio: Float[Tensor, " n"]
    clipped: Float[Tensor, " n"]


class RankTerm(NamedTuple):
    """What sorted probabilities add to the loss, with a gradient of its own."""

    weight: Float[Tensor, ""]
    """Its share of the teacher's part; the divergence between ids has the rest."""
    distance: Float[Tensor, " n"]


class Teacher(NamedTuple):
    """The teacher's distribution at one temperature."""

    logp: Float[Tensor, "n categories"]
    """log p of the stored tokens, then of the tail; all −inf at a position without a target."""
    log_normaliser: Float[Tensor, " n"]
    tail_logmass: Float[Tensor, " n"]
    """A(β), before normalisation; −inf if the tail is empty."""


def teacher_categories(targets: Targets, settings: Settings) -> Teacher:
    """The teacher's k stored tokens and its tail at the temperature of `settings`."""
    taught = targets.has_head[:, None]
    mass = tail_logmass_at(targets.tail_logmass, settings.beta, xp=torch)
    if settings.tail == "renormalize":
        mass = torch.full_like(mass, -torch.inf)
    mass = mass.where(taught[:, 0], -torch.inf)
    unnormalised = torch.cat([settings.beta * targets.logprobs, mass[:, None]], -1)
    normaliser = torch.logsumexp(unnormalised, -1)
    normaliser = normaliser.where(torch.isfinite(normaliser), 0.0)
    return Teacher(unnormalised - normaliser[:, None], normaliser, mass)


def position_losses(
    view: StudentView,
    targets: Targets,
    *,
    settings: Settings,
    shape: TailShape | None,
    ranks: RankTerm | None = None,
) -> tuple[Float[Tensor, " n"], Parts]:
    """α·T²·D + (1 − α)·CE of each position, differentiable in `view`; and its parts.

    `ranks` is for `uld` and `gold`. Its gradient is not in that of `view`.
    """
    if settings.divergence == "on_policy":
        return _on_policy_losses(view, targets, settings)
    if settings.tail == "counts":
        return _counts_losses(view, targets, settings)
    teacher, beta = teacher_categories(targets, settings), settings.beta
    logq = torch.cat([beta * view.head, view.tail_soft[:, None]], -1)
    logq = logq - torch.logsumexp(logq, -1, keepdim=True)
    logq = logq.where(targets.has_head[:, None], -torch.inf)
    soft = divergence(teacher.logp, logq, kind=settings.of_ids, mix=settings.mix)
    bound = _kl(teacher.logp, logq)
    kl = bound
    if settings.tail == "sampled":
        soft = kl = bound + _from_draws(view, targets, teacher, beta=beta)
    elif shape is not None:
        soft = kl = bound + _from_shape(view, targets, teacher, shape, beta=beta)
    return _position_loss(soft, kl, bound, view, targets, settings, ranks)


def dense_losses(
    logits: Float[Tensor, "n vocab"],
    view: StudentView,
    targets: Targets,
    *,
    settings: Settings,
    shape: TailShape,
) -> tuple[Float[Tensor, " n"], Parts]:
    """As `position_losses`, with every token a category and the tail spread as `shape` says.

    For divergences other than forward KL, which have no shortcut. Differentiable in `logits`.
    """
    teacher = teacher_categories(targets, settings)
    logp = shape.spread(teacher.logp[:, -1], targets)
    logp = set_stored(logp, targets, teacher.logp[:, :-1])
    logq = torch.log_softmax(settings.beta * logits, -1)
    logq = logq.where(targets.has_head[:, None], -torch.inf)
    soft = divergence(logp, logq, kind=settings.divergence, mix=settings.mix)
    bound = torch.cat([settings.beta * view.head, view.tail_soft[:, None]], -1)
    bound = _kl(teacher.logp, bound - torch.logsumexp(bound, -1, keepdim=True))
    return _position_loss(soft, _kl(logp, logq), bound, view, targets, settings)


def _counts_losses(
    view: StudentView, targets: Targets, settings: Settings
) -> tuple[Float[Tensor, " n"], Parts]:
    """As `position_losses`. The bound is 0 if no head is stored."""
    assert view.drawn is not None
    logq = torch.cat([view.head, view.tail_hard[:, None]], -1)
    log_normaliser = torch.logsumexp(logq, -1)
    soft = kl_to_counts(view.drawn, log_normaliser, targets)
    bound = torch.zeros_like(soft)
    if targets.ids.shape[-1]:
        bound = _kl(teacher_categories(targets, settings).logp, logq - log_normaliser[:, None])
    return _position_loss(soft, soft, bound, view, targets, settings)


def _position_loss(
    soft: Float[Tensor, " n"],
    kl: Float[Tensor, " n"],
    bound: Float[Tensor, " n"],
    view: StudentView,
    targets: Targets,
    settings: Settings,
    ranks: RankTerm | None = None,
) -> tuple[Float[Tensor, " n"], Parts]:
    hard = torch.cat([view.head, view.tail_hard[:, None]], -1)
    ce = torch.logsumexp(hard, -1) - view.label
    taught = targets.taught.float()
    alpha = settings.teachers_share * taught
    others = (1 - alpha) * ce
    if ranks is not None:
        others = others + alpha * settings.temperature * ranks.weight * ranks.distance
        alpha = alpha * (1 - ranks.weight)
    loss = alpha * settings.scale * soft + others
    zero = torch.zeros_like(taught)
    return loss, Parts(
        loss=loss.detach(),
        kl=kl.detach(),
        kl_bound=bound.detach(),
        ce=ce.detach(),
        agreement=view.agrees.float(),
        taught=taught,
        advantage=zero,
        ratio=zero,
        clipped=zero,
    )


def _on_policy_losses(
    view: StudentView, targets: Targets, settings: Settings
) -> tuple[Float[Tensor, " n"], Parts]:
    """As `position_losses`: written tokens have their terms, all others their cross-entropy.

    Nothing is learned from a written token that the teacher gave no probability.
    """
    assert targets.label_logprobs is not None
    assert targets.writer_logprobs is not None
    ce = view.tail_hard - view.label
    taught, own = targets.taught, -ce.detach()
    # The double where: NaN and −inf at other positions must not reach the sums.
    terms = policy_terms(
        own,
        targets.label_logprobs.where(taught, own),
        targets.writer_logprobs.where(taught, own),
        clip=settings.clip,
        anchor=settings.anchor,
    )
    scored, alpha = taught.float(), settings.teachers_share
    hard = (1 - alpha) * scored + (~targets.written).float()
    policy = terms.value + terms.weight * (ce - ce.detach())
    loss = alpha * scored * policy + hard * ce
    zero = torch.zeros_like(scored)
    return loss, Parts(
        loss=loss.detach(),
        kl=zero,
        kl_bound=zero,
        ce=ce.detach(),
        agreement=zero,
        taught=scored,
        advantage=scored * terms.advantage,
        ratio=scored * terms.ratio,
        clipped=scored * terms.clipped,
    )


def divergence(
    logp: Float[Tensor, "n categories"],
    logq: Float[Tensor, "n categories"],
    *,
    kind: str,
    mix: float,
) -> Float[Tensor, " n"]:
    """D(teacher p, student q) of each position, in nats. A missing category is −inf in both."""
    if kind == "forward_kl":
        return _kl(logp, logq)
    if kind == "reverse_kl":
        return _kl(logq, logp)
    if kind == "jsd":
        middle = _log_mixture(logp, logq, mix)
        return mix * _kl(logp, middle) + (1 - mix) * _kl(logq, middle)
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)


def _kl(
    logp: Float[Tensor, "n categories"], logq: Float[Tensor, "n categories"]
) -> Float[Tensor, " n"]:
    # The double where: p·(log p − log q) at p = 0 is 0·(−inf), whose value *and* gradient are NaN.
    present = torch.isfinite(logp)
    safe_p, safe_q = logp.where(present, 0.0), logq.where(present, 0.0)
    return (safe_p.exp() * (safe_p - safe_q)).where(present, 0.0).sum(-1)


def _log_mixture(
    logp: Float[Tensor, "n categories"], logq: Float[Tensor, "n categories"], mix: float
) -> Float[Tensor, "n categories"]:
    """log(mix·p + (1 − mix)·q); where both are −inf, a finite number that nothing reads."""
    absent = torch.isneginf(logp) & torch.isneginf(logq)
    weights = torch.tensor([mix, 1 - mix], dtype=torch.float64).log().tolist()
    safe_p, safe_q = logp.where(~absent, 0.0), logq.where(~absent, 0.0)
    return torch.logaddexp(weights[0] + safe_p, weights[1] + safe_q)


def _from_draws(
    view: StudentView, targets: Targets, teacher: Teacher, *, beta: float
) -> Float[Tensor, " n"]:
    """Σ_i ω_i [log(p_i/t) − log(q_i/τ)] with ω_i = p(v_i) / (m·r(v_i))."""
    logprobs, logweights = targets.drawn_logprobs, targets.drawn_logweights
    assert logprobs is not None
    assert logweights is not None
    assert view.drawn is not None
    # A position without a target has no tail, even if its record holds draws.
    there = torch.isfinite(logprobs) & torch.isfinite(logweights)
    there &= torch.isfinite(teacher.tail_logmass)[:, None]
    # The double where: a missing draw is −inf, and −inf − (−inf) is NaN.
    logp = beta * logprobs.where(there, 0.0)
    weight = logp - teacher.log_normaliser[:, None] + logweights.where(there, 0.0)
    omega = weight.exp().where(there, 0.0)
    log_ratio = logp - teacher.tail_logmass[:, None] - beta * view.drawn + view.tail_soft[:, None]
    return (omega * log_ratio).where(there, 0.0).sum(-1)


def _from_shape(
    view: StudentView, targets: Targets, teacher: Teacher, shape: TailShape, *, beta: float
) -> Float[Tensor, " n"]:
    """Σ_v p_v [log(p_v/t) − log(q_v/τ)] over the tail, where p_v = t·π_v/Π."""
    assert view.expected is not None
    share, entropy = shape.tail_sums(targets)
    t, has_tail = teacher.logp[:, -1].exp(), share > 0
    safe = share.where(has_tail, 1.0)
    cross = entropy - beta * view.expected
    return t * (cross / safe - safe.log() + view.tail_soft.where(has_tail, 0.0))
