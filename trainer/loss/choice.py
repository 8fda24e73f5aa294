"""Which `loss.tail` a loss gets: the choice if it is unset, and what to say about an explicit one.

`Asked.best_tail` makes the choice.
"""

from __future__ import annotations

import dataclasses

from decant.served_losses import BY_RANK, FEWEST_DRAWS, Held
from decant.trainer.loss.settings import Loss


def choose_tail(
    loss: Loss, held: Held, *, draws_of_token: float | None = None
) -> tuple[Loss, str | None]:
    """The loss with a tail, and a line about it: the reason of a choice, or a warning.

    `on_policy` has no tail; `uld` and `gold` take it as one category. `draws_of_token` as for
    `Asked.best_tail`.
    ValueError if no tail of these caches fits the loss.
    """
    if loss.divergence == "on_policy":
        return loss, None
    if loss.divergence in BY_RANK and held.k:
        return dataclasses.replace(loss, tail="bucket"), None
    if loss.tail is not None:
        weakness = loss.asked.weakness(loss.tail, held)
        return loss, f"loss.tail = {loss.tail}: {weakness}" if weakness else None
    tail = loss.asked.best_tail(held, draws_of_token=draws_of_token)
    assert tail is not None
    where = f"T = {loss.asked.highest:.4g}"
    if loss.divergence != "forward_kl":
        where += f" with {loss.divergence}"
    line = f"loss.tail is {tail}, for {where}; the cache holds {held}"
    if tail != loss.asked.best_tail(held):
        line += (
            f". Counts would come first, but those of one update draw a token {draws_of_token:.2g} "
            f"times on average, and below {FEWEST_DRAWS:g} they teach less (docs/benchmarks.md)"
        )
    if weakness := loss.asked.weakness(tail, held):
        line += f". {weakness}"
    return dataclasses.replace(loss, tail=tail), line
