"""The targets of a batch's counted positions, in one list without rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decant.schemas.records.rows import next_tokens
from decant.torch.settings import Settings, Tail


class Targets(NamedTuple):
    """What n counted positions are scored against."""

    labels: Int[Tensor, " n"]
    """The next token of each position."""
    ids: Int[Tensor, "n k"]
    logprobs: Float[Tensor, "n k"]
    """In nats, at T = 1, over the full vocabulary; −inf where nothing is stored."""
    tail_logmass: Float[Tensor, "n nodes"]
    drawn_ids: Int[Tensor, "n m"] | None = None
    """Tail draws, with repeats; with tail = "counts" the ids that have counts."""
    drawn_logprobs: Float[Tensor, "n m"] | None = None
    """As `logprobs`; −inf where there is no draw. This and the next are for tail = "sampled"."""
    drawn_logweights: Float[Tensor, "n m"] | None = None
    """−log(m·r(v)), where r is the proposal over the tail; −inf where there is no draw."""
    counts: Int[Tensor, "n m"] | None = None
    """How often each of `drawn_ids` was drawn; 0 in an empty slot. For tail = "counts"."""
    sketch: Float[Tensor, "n r"] | None = None
    """This and the next are for tail = "sketch"."""
    sketch_basis: Int[Tensor, " n"] | None = None
    """Which of the bases of `SketchTables` the sketch refers to."""

    @property
    def stored(self) -> Bool[Tensor, "n k"]:
        """Which of the k columns hold a target. Column 0 does if any does."""
        return torch.isfinite(self.logprobs)

    @property
    def taught(self) -> Bool[Tensor, " n"]:
        """Which positions have a teacher's targets."""
        taught = self.stored.any(-1)
        return taught if self.counts is None else taught | (self.counts > 0).any(-1)

    @property
    def likeliest(self) -> Int[Tensor, " n"]:
        """The teacher's likeliest token, or that with the largest count if no head is stored."""
        if self.ids.shape[-1]:
            return self.ids[:, 0]
        assert self.drawn_ids is not None
        assert self.counts is not None
        return self.drawn_ids.gather(1, self.counts.argmax(-1, keepdim=True))[:, 0]

    def chunks(self, length: int) -> Iterator[tuple[slice, Targets]]:
        """Slices of at most `length` positions, and their targets."""
        for start in range(0, len(self.labels), length):
            at = slice(start, start + length)
            yield at, Targets(*(x if x is None else x[at] for x in self))


def counted_positions(batch: Mapping[str, Tensor], device: torch.device) -> Int[Tensor, " n"]:
    """Flat indices of the positions that count, [rows · S]."""
    return batch["loss_mask"].flatten().nonzero()[:, 0].to(device)


_ALWAYS = {
    "labels": "labels",
    "topk_ids": "ids",
    "topk_logprobs": "logprobs",
    "tail_logmass": "tail_logmass",
}
_BY_TAIL = {
    "sampled": {
        "tail_ids": "drawn_ids",
        "tail_logprobs": "drawn_logprobs",
        "tail_logweights": "drawn_logweights",
    },
    "counts": {"count_ids": "drawn_ids", "counts": "counts"},
    "sketch": {"sketch": "sketch", "sketch_basis": "sketch_basis"},
}
"""Field of `Targets` for each array of a batch that a tail needs."""


def targets_of(batch: Mapping[str, Tensor], counted: Int[Tensor, " n"], *, tail: Tail) -> Targets:
    """The targets of the positions `counted`. ValueError if the batch lacks an array."""
    names = _ALWAYS | _BY_TAIL.get(tail, {})
    if "labels" not in batch and "tokens" in batch:  # arrays of `Cache.read`
        batch = {**batch, "labels": next_tokens(batch["tokens"], xp=torch)}
    for name in names:
        if name not in batch:
            raise ValueError(f"no {name!r} in this batch, which holds {', '.join(batch)}")
    length = batch["loss_mask"].shape[1]

    def chosen(name: str) -> Tensor:
        array = batch[name].to(counted.device)
        # A row has one basis.
        array = array[counted // length] if name == "sketch_basis" else array.flatten(0, 1)[counted]
        return array if array.is_floating_point() else array.long()

    return Targets(**{field: chosen(name) for name, field in names.items()})


def set_stored(
    x: Float[Tensor, "n vocab"], targets: Targets, values: Float[Tensor, "n k"] | float
) -> Float[Tensor, "n vocab"]:
    """`x` itself, with `values` written in the stored columns."""
    stored = targets.stored
    # Padding repeats id 0, which may be stored too. A repeated column must get the same value, so
    # padding repeats column 0 of the targets; where nothing is stored, x keeps its own values.
    columns = targets.ids.where(stored, targets.ids[:, :1])
    written = x.gather(1, columns)
    if isinstance(values, int | float):
        written.masked_fill_(stored[:, :1], values)
    else:
        written = values.where(stored, values[:, :1]).where(stored[:, :1], written)
    return x.scatter_(1, columns, written)


def require_targets(batch: Mapping[str, Tensor], settings: Settings) -> None:
    """ValueError if the batch lacks what `settings` learns from, or a lower T made its draws."""
    if settings.tail != "counts" and "topk_ids" in batch and not batch["topk_ids"].shape[-1]:
        raise ValueError(
            f"this cache has counts and no top-k, so tail = {settings.tail} has nothing to learn "
            "from. Use tail = counts at T = 1, or capture with --signals.logits.k 8"
        )
    for tail, name, what, add in _NEEDED:
        if settings.tail == tail and name not in batch:
            raise ValueError(
                f"this cache has no {what}, which tail = {tail} learns from. Use tail = prior or "
                f"bucket, or {add}"
            )
    highest = getattr(batch, "highest_temperature", None)
    if settings.tail != "sampled" or highest is None:
        return
    if settings.temperature > highest + 1e-6:
        raise ValueError(
            f"temperature is {settings.temperature:.4g}, but the tails were drawn from at T up to "
            f"{highest:.4g}: a few draws would weigh more than all others. Use tail = sketch, "
            "prior or bucket"
        )


_NEEDED = (
    ("sampled", "tail_ids", "draws from the tail", "capture with --signals.logits.draws 16"),
    (
        "counts",
        "counts",
        "counts",
        "add them: run `decant precompute` again with --signals.logits.counts 100",
    ),
    (
        "sketch",
        "sketch",
        "sketch",
        "add one: run `decant precompute` again with --signals.logits.sketch.rank 64",
    ),
)
"""Tails, the array that each needs, its name in words, and how a cache gets it."""
