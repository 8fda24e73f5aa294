"""The targets of a batch's counted positions, in one list without rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decant.schemas.records.rows import next_tokens
from decant.torch.settings import Settings


class Targets(NamedTuple):
    """What n counted positions are scored against."""

    labels: Int[Tensor, " n"]
    """The next token of each position."""
    ids: Int[Tensor, "n k"]
    logprobs: Float[Tensor, "n k"]
    """In nats, at T = 1, over the full vocabulary; −inf where nothing is stored."""
    tail_logmass: Float[Tensor, "n nodes"]
    drawn_ids: Int[Tensor, "n m"] | None = None
    """Tail draws, with repeats. This and the next two are None unless tail = "sampled"."""
    drawn_logprobs: Float[Tensor, "n m"] | None = None
    """As `logprobs`; −inf where there is no draw."""
    drawn_logweights: Float[Tensor, "n m"] | None = None
    """−log(m·r(v)), where r is the proposal over the tail; −inf where there is no draw."""

    @property
    def stored(self) -> Bool[Tensor, "n k"]:
        """Which of the k columns hold a target. Column 0 does if any does."""
        return torch.isfinite(self.logprobs)

    def chunks(self, length: int) -> Iterator[tuple[slice, Targets]]:
        """Slices of at most `length` positions, and their targets."""
        for start in range(0, len(self.labels), length):
            at = slice(start, start + length)
            yield at, Targets(*(x if x is None else x[at] for x in self))


def counted_positions(batch: Mapping[str, Tensor], device: torch.device) -> Int[Tensor, " n"]:
    """Flat indices of the positions that count, [rows · S]."""
    return batch["loss_mask"].flatten().nonzero()[:, 0].to(device)


def targets_of(batch: Mapping[str, Tensor], counted: Int[Tensor, " n"], *, draws: bool) -> Targets:
    """The targets of the positions `counted`. ValueError if the batch lacks an array."""
    names = ["labels", "topk_ids", "topk_logprobs", "tail_logmass"]
    names += ["tail_ids", "tail_logprobs", "tail_logweights"] if draws else []
    if "labels" not in batch and "tokens" in batch:  # arrays of `Cache.read`
        batch = {**batch, "labels": next_tokens(batch["tokens"], xp=torch)}
    for name in names:
        if name not in batch:
            raise ValueError(f"no {name!r} in this batch, which holds {', '.join(batch)}")
    chosen = (batch[name].to(counted.device).flatten(0, 1)[counted] for name in names)
    return Targets(*(x if x.is_floating_point() else x.long() for x in chosen))


def require_draws(batch: Mapping[str, Tensor], settings: Settings) -> None:
    """ValueError if `settings` learns from draws that the batch lacks, or that a lower T made."""
    if settings.tail != "sampled":
        return
    if "tail_ids" not in batch:
        raise ValueError(
            "this cache has no draws from the tail, which tail = sampled learns from. Use "
            "tail = prior or bucket, or capture with --signals.logits.draws 16"
        )
    highest = getattr(batch, "highest_temperature", None)
    if highest is not None and settings.temperature > highest + 1e-6:
        raise ValueError(
            f"temperature is {settings.temperature:.4g}, but the tails were drawn from at T up to "
            f"{highest:.4g}: a few draws would weigh more than all others. Use tail = prior or "
            "bucket"
        )
