"""The targets of a batch's counted positions, in one list without rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decant.schemas.reading.held import held_by_batch
from decant.schemas.records.rows import next_tokens
from decant.schemas.targets.unmatched import UNMATCHED
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
    label_logprobs: Float[Tensor, " n"] | None = None
    """The teacher's log-probability of the label; −inf where unknown. This and the next are for
    divergence = "on_policy"."""
    writer_logprobs: Float[Tensor, " n"] | None = None
    """The log-probability that the label's writer gave it; NaN where no model wrote the label."""
    unmatched: Float[Tensor, "n k"] | None = None
    """Log-probabilities of the teacher's tokens without a partner in the student's vocabulary,
    descending. `tail_logmass` holds their mass. None: not made by `--targets matched`."""

    @property
    def stored(self) -> Bool[Tensor, "n k"]:
        """Which of the k columns hold a target. Column 0 does if any does."""
        return torch.isfinite(self.logprobs)

    @property
    def taught(self) -> Bool[Tensor, " n"]:
        """Which positions have a teacher's targets."""
        if self.label_logprobs is not None:
            return self.written & torch.isfinite(self.label_logprobs)
        taught = self.has_head
        return taught if self.counts is None else taught | (self.counts > 0).any(-1)

    @property
    def has_head(self) -> Bool[Tensor, " n"]:
        """Which positions have stored tokens, with or without a partner, and a tail's mass."""
        stored = self.stored.any(-1)
        return stored if self.unmatched is None else stored | (self.unmatched > -torch.inf).any(-1)

    @property
    def written(self) -> Bool[Tensor, " n"]:
        """Which positions have a label that a model wrote."""
        assert self.writer_logprobs is not None
        return torch.isfinite(self.writer_logprobs)

    @property
    def likeliest(self) -> Int[Tensor, " n"]:
        """The teacher's likeliest token, or that with the largest count if no head is stored; −1
        where none is known, or the student has no such token."""
        if self.ids.shape[-1]:
            ids = self.ids[:, 0]
            if self.unmatched is None:
                return ids
            return ids.where(self.unmatched[:, 0] <= self.logprobs[:, 0], -1)
        if self.drawn_ids is None or self.counts is None:
            return torch.full_like(self.labels, -1)
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


_WRITTEN = {name: name for name in ("labels", "label_logprobs", "writer_logprobs")}


def targets_of(
    batch: Mapping[str, Tensor], counted: Int[Tensor, " n"], *, settings: Settings
) -> Targets:
    """The targets of the positions `counted`. ValueError if the batch lacks an array."""
    names = _ALWAYS | _BY_TAIL.get(settings.tail or "", {})
    if settings.divergence == "on_policy":
        names = _WRITTEN
    elif UNMATCHED in batch:
        names = names | {UNMATCHED: "unmatched"}
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

    fields = {field: chosen(name) for name, field in names.items()}
    if "ids" not in fields:
        nothing = torch.zeros((len(counted), 0), device=counted.device)
        fields |= {"ids": nothing.long(), "logprobs": nothing, "tail_logmass": nothing}
    return Targets(**fields)


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
    settings.asked.require_held(held_by_batch(batch), where="this batch")
