"""The tail prior at one temperature: the corpus's mean shape of a tail."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from decant.schemas.targets.targets import BETAS
from decant.torch.targets import Targets, set_stored

LOG_PRIOR_FLOOR = -60.0
"""Lower clamp on log π, so that its exponential and the reciprocal of that fit float32."""

MIN_TAIL_SHARE = 1 / 16
"""If a tail's share of π is smaller, subtraction loses more than four bits."""


class Prior(NamedTuple):
    """π over the vocabulary, which sums to one."""

    log_pi: Float[Tensor, " vocab"]
    pi: Float[Tensor, " vocab"]

    @classmethod
    def at(cls, nodes: Tensor | np.ndarray, *, beta: float, device: torch.device) -> Prior:
        """π at β, interpolated between the nodes of `Cache.tail_prior` [nodes, vocab] in log π."""
        table: Any = torch.as_tensor(nodes, device=device)
        # The share of each node: 1 at its own β, falling to 0 at its neighbours' β.
        shares = [float(np.interp(beta, BETAS, row)) for row in np.eye(len(BETAS))]
        log_pi = (torch.tensor(shares, device=device)[:, None] * table.float()).sum(0)
        log_pi = (log_pi - torch.logsumexp(log_pi, 0)).clamp(min=LOG_PRIOR_FLOOR)
        return cls(log_pi, log_pi.exp())

    def tail_sums(self, targets: Targets) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Π = Σ π_v and Σ π_v·log π_v over each position's tail.

        The cheap way subtracts the stored tokens from sums over the vocabulary. It cancels if they
        hold nearly all of π. Positions where they do sum over masked tails.
        """
        stored = targets.stored
        head = self.pi[targets.ids].where(stored, 0.0)
        share = self.pi.sum() - head.sum(-1)
        entropy = (self.pi * self.log_pi).sum() - (head * self.log_pi[targets.ids]).sum(-1)
        small = (share <= MIN_TAIL_SHARE).nonzero()[:, 0]
        if len(small):
            tail = self._masked(Targets(*(x if x is None else x[small] for x in targets)))
            share, entropy = share.clone(), entropy.clone()
            share[small] = tail.sum(-1)
            entropy[small] = (tail * self.log_pi).sum(-1)
        return share, entropy

    def expected(self, tails: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
        """Σ π_v·x_v, for x that is 0 in the stored columns."""
        return tails @ self.pi

    def add_to(
        self, x: Float[Tensor, "n vocab"], factor: Float[Tensor, " n"], targets: Targets
    ) -> Float[Tensor, "n vocab"]:
        """`x` itself, with factor·π added in the tail and zeros in the stored columns."""
        return set_stored(x.addr_(factor, self.pi), targets, 0.0)

    def spread(self, log_mass: Float[Tensor, " n"], targets: Targets) -> Float[Tensor, "n vocab"]:
        """log of a tail's mass spread over the vocabulary as π is over the tail.

        Stored columns hold arbitrary numbers.
        """
        share = self._masked(targets).sum(-1)
        level = log_mass - share.where(share > 0, 1.0).log()
        return level[:, None] + self.log_pi

    def _masked(self, targets: Targets) -> Float[Tensor, "n vocab"]:
        """π with zeros in the stored columns."""
        # Column 0 of the targets is stored if any is, so that padding repeats a stored id.
        columns = targets.ids.where(targets.stored, targets.ids[:, :1])
        tail = self.pi.repeat(len(columns), 1)
        kept = tail.gather(1, columns).where(~targets.stored[:, :1], 0.0)
        return tail.scatter_(1, columns, kept)
