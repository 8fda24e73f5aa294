"""Which `loss.tail` a loss gets: the choice if it is unset, and what to say about an explicit one.

`Asked.best_tail` makes the choice.
"""

from __future__ import annotations

import dataclasses

from decant.schemas.disk.layout import COUNTS, SKETCH
from decant.schemas.reading.record_signals import DRAWS, LABELS
from decant.served_losses import ADD_SKETCH, BY_RANK, Divergence, Held, Tail, weak_from
from decant.trainer.loss.settings import Loss


def choose_tail(loss: Loss, held: Held) -> tuple[Loss, str | None]:
    """The loss with a tail, and a line about it: the reason of a choice, or a warning.

    `on_policy` has no tail; `uld` and `gold` take it as one category.
    ValueError if no tail of these caches fits the loss.
    """
    highest = loss.asked.highest
    if loss.divergence == "on_policy":
        return loss, None
    if loss.divergence in BY_RANK and held.k:
        return dataclasses.replace(loss, tail="bucket"), None
    if loss.tail is not None:
        return loss, _warning(loss.tail, highest, held)
    tail = loss.asked.best_tail(held)
    assert tail is not None
    where = f"T = {highest:.4g}"
    if loss.divergence != "forward_kl":
        where += f" with {loss.divergence}"
    line = f"loss.tail is {tail}, for {where}; the cache holds {held}"
    if more := _weakness(tail, highest, held):
        line += f". {more}"
    return dataclasses.replace(loss, tail=tail), line


def _warning(tail: Tail, highest: float, held: Held) -> str | None:
    weakness = _weakness(tail, highest, held)
    return f"loss.tail = {tail}: {weakness}" if weakness else None


def _weakness(tail: Tail, highest: float, held: Held) -> str | None:
    if highest < weak_from(tail):
        return None
    better = "loss.tail = sketch" if held.sketch else f"sketches: {ADD_SKETCH}"
    return (
        f"At T = {highest:.4g} a student learns little from it (docs/benchmarks.md); better are "
        f"{better}"
    )


def tail_signals(tail: Tail | None) -> tuple[str, ...]:
    """Signals that a loss with this tail reads beside `logits`."""
    return (tail,) if tail in (COUNTS, SKETCH) else ()


def loss_targets(tail: Tail | None, divergence: Divergence = "forward_kl") -> tuple[str, ...]:
    """`targets` of `Cache.read` for a loss; all others need not be decoded."""
    if divergence == "on_policy":
        return (LABELS,)
    return (DRAWS,) if tail == "sampled" else tail_signals(tail)
