"""Which `loss.tail` a loss gets: the choice if it is unset, and what to say about an explicit one.

Unset at T = 1 throughout: counts, else a sketch, else draws. With any T > 1: a sketch, else draws
up to the T that they were made for. Where none of these is possible: the prior, else the bucket.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from decant.schemas import Cache
from decant.schemas.disk.layout import COUNTS, SKETCH
from decant.trainer.loss.settings import BY_RANK, Loss, Tail

ADD = "add it to this cache: the same precompute config with"
ADD_COUNTS = f"{ADD} --signals.logits.counts 100"
ADD_SKETCH = f"{ADD} --signals.logits.sketch.rank 64"
_WEAK: dict[Tail, float] = {"renormalize": 2, "bucket": 2, "prior": 2, "sampled": 4}
"""T from which a student learns little from a tail (docs/benchmarks.md)."""


@dataclass(frozen=True)
class Held:
    """What the caches of a run hold for the loss, all of them."""

    k: int
    counts: bool = False
    sketch: bool = False
    drawn_at: float | None = None
    """The highest T that the tail draws are made for. None: no draws."""
    prior: bool = False

    @classmethod
    def by(cls, caches: Sequence[Cache]) -> Held:
        """What each of these caches with targets holds."""
        each = [cls._by_one(cache) for cache in caches]
        teachers = {cache.manifest.logits.teacher_id for cache in caches}
        drawn = [held.drawn_at for held in each]
        return cls(
            k=min(held.k for held in each),
            counts=all(held.counts for held in each),
            sketch=all(held.sketch for held in each),
            drawn_at=None if None in drawn else min(at for at in drawn if at is not None),
            prior=all(held.prior for held in each) and len(teachers) == 1,
        )

    @classmethod
    def _by_one(cls, cache: Cache) -> Held:
        logits, signals = cache.manifest.logits, cache.manifest.signals
        return cls(
            k=logits.k,
            counts=COUNTS in signals,
            sketch=SKETCH in signals,
            drawn_at=1 / min(logits.draw_betas) if logits.draws else None,
            prior=cache.has_tail_prior,
        )

    def __str__(self) -> str:
        parts = {
            f"the top {self.k} and their tail's mass": self.k > 0,
            f"tail draws up to T = {self.drawn_at or 1:.4g}": self.drawn_at is not None,
            "counts": self.counts,
            "a sketch": self.sketch,
        }
        return ", ".join(name for name, there in parts.items() if there)


def choose_tail(loss: Loss, held: Held) -> tuple[Loss, str | None]:
    """The loss with a tail, and a line about it: the reason of a choice, or a warning.

    `on_policy` has no tail; `uld` and `gold` take it as one category.
    ValueError if no tail of these caches fits the loss.
    """
    highest = max(loss.schedules["temperature"].ends)
    if loss.divergence == "on_policy":
        return loss, None
    if loss.divergence in BY_RANK and held.k:
        return dataclasses.replace(loss, tail="bucket"), None
    if loss.tail is not None:
        return loss, _warning(loss.tail, highest, held)
    forward = loss.divergence == "forward_kl"
    drawn = forward and held.k > 0 and (held.drawn_at or 0) + 1e-6 >= highest
    possible: dict[Tail, bool] = {
        "counts": forward and held.counts and highest == 1,
        "sketch": held.sketch and held.k > 0,
        "sampled": drawn,
        "prior": held.prior and held.k > 0,
        "bucket": held.k > 0,
    }
    fitting: list[Tail] = [tail for tail, fits in possible.items() if fits]
    tail = fitting[0] if fitting else None
    if tail is None:
        raise ValueError(
            f"these targets are {held}, which serve forward_kl at T = 1 only, but this loss is "
            f"{loss.divergence} at T up to {highest:.4g}. Use --loss.temperature 1 "
            "--loss.divergence forward_kl, or capture with --signals.logits.k 8"
        )
    where = f"T = {highest:.4g}" + ("" if forward else f" with {loss.divergence}")
    line = f"loss.tail is {tail}, for {where}; the cache holds {held}"
    if more := _weakness(tail, highest, held):
        line += f". {more}"
    return dataclasses.replace(loss, tail=tail), line


def _warning(tail: Tail, highest: float, held: Held) -> str | None:
    weakness = _weakness(tail, highest, held)
    return f"loss.tail = {tail}: {weakness}" if weakness else None


def _weakness(tail: Tail, highest: float, held: Held) -> str | None:
    if highest < _WEAK.get(tail, float("inf")):
        return None
    better = "loss.tail = sketch" if held.sketch else f"sketches: {ADD_SKETCH}"
    return (
        f"At T = {highest:.4g} a student learns little from it (docs/benchmarks.md); better are "
        f"{better}"
    )


def tail_signals(tail: Tail | None) -> tuple[str, ...]:
    """Signals that a loss with this tail reads beside `logits`."""
    return (tail,) if tail in (COUNTS, SKETCH) else ()
