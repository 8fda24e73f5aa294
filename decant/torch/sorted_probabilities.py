"""Distances between sorted probabilities; `trainer/loss/sorted_probabilities.py` explains them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from decant.schemas.targets.unmatched import Partners
from decant.torch.divergences import RankTerm, teacher_categories
from decant.torch.settings import Settings
from decant.torch.targets import Targets


class SortedDistance(NamedTuple):
    """The distance of n positions and its part in the loss."""

    term: RankTerm
    gradient: Float[Tensor, "n vocab"]
    """Of the distance, with respect to the logits."""


def distance_by_rank(
    logits: Float[Tensor, "n vocab"],
    targets: Targets,
    *,
    settings: Settings,
    partners: Partners | None,
) -> SortedDistance:
    """ULD over both vocabularies; with `partners` that over the tokens without one, for GOLD.

    `logits` stay as they are.
    """
    teacher, beta = teacher_categories(targets, settings), settings.beta
    logp, rest = teacher.logp[:, :-1], teacher.logp[:, -1].exp()
    if targets.unmatched is not None:
        unmatched = beta * targets.unmatched - teacher.log_normaliser[:, None]
        # The stored mass of the rest includes that of these tokens.
        rest = (rest - unmatched.exp().sum(-1)).clamp(min=0)
        both = torch.cat([logp, unmatched], -1)
        logp = unmatched if partners else both.topk(logp.shape[-1]).values
    compared = None if partners is None else partners.alone > 0
    value, gradient = _sorted_distance(logits, logp.exp(), rest, beta=beta, compared=compared)
    weight = torch.ones((), device=logits.device) if partners is None else 1 - partners.share
    return SortedDistance(RankTerm(weight, value), gradient)


def _sorted_distance(
    logits: Float[Tensor, "n vocab"],
    p: Float[Tensor, "n k"],
    rest: Float[Tensor, " n"],
    *,
    beta: float,
    compared: Tensor | None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n vocab"]]:
    """The distance and its gradient. `p` descends, 0 where no token is stored."""
    missing = (0, max(0, p.shape[-1] - logits.shape[-1]))
    among = logits if compared is None else logits.where(compared, -torch.inf)
    values, ids = among.topk(min(p.shape[-1], logits.shape[-1]))
    values, ids = functional.pad(values, missing, value=-torch.inf), functional.pad(ids, missing)
    every_q = torch.softmax(beta * logits, -1)
    # A rank without a stored probability belongs to the rest; one without a student's token has
    # q = 0 and no column.
    stored = p > 0
    paired = stored & torch.isfinite(values)
    q = every_q.gather(1, ids).where(paired, 0.0)
    whole = torch.ones_like(rest) if compared is None else every_q @ compared.float()
    others = (whole - q.sum(-1)).clamp(min=0)
    excess = others - rest
    if compared is not None:
        excess = excess.clamp(min=0)
    slopes, of_rest = torch.sign(q - p), torch.sign(excess)
    mean = (q * slopes).sum(-1) + of_rest * others
    each = of_rest[:, None].expand_as(logits)
    each = each.clone() if compared is None else each * compared
    each.scatter_add_(1, ids, (slopes - of_rest[:, None]).where(paired, 0.0))
    value = (q - p).abs().sum(-1) + excess.abs()
    return value, each.sub_(mean[:, None]).mul_(every_q).mul_(beta)
