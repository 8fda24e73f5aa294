"""What `logits` means for one position: the top-k, the tail's mass at every T, draws from it.

Log-probabilities are natural, taken at T = 1 and normalised over the full vocabulary.
β = 1/T. The tail is the vocabulary outside the stored top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decant.schemas.targets.draws import Draws

BETAS: tuple[float, ...] = (0.0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1.0)
"""Inverse temperatures at which the tail's mass is known. β = 0 counts the tail's ids."""

EIGHTHS: tuple[float, ...] = tuple(n / 8 for n in range(9))
"""The finer nodes of `lossless`. Between them A(β) is known to 2e-6 nats of KL at every position
(benchmarks/tail.py); `BETAS` misses that at a few, by less than what levels round off anyway."""

_NODES = {len(nodes): nodes for nodes in (BETAS, EIGHTHS)}


@dataclass(frozen=True)
class Targets:
    """The targets of n scored positions.

    `ids` int32 [n, k] in descending log-probability, equals by the lower id.
    `logprobs` float32 [n, k] in nats.
    `tail_logmass` float32 [n, nodes] in nats: log Σ_{v in tail} exp(β·logp(v)) at each of `BETAS`
    (7) or `EIGHTHS` (9); −inf where the tail is empty.
    `draws` from the tail, if any were asked for.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    tail_logmass: np.ndarray
    draws: Draws | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, positions: slice | np.ndarray) -> "Targets":
        return Targets(
            self.ids[positions],
            self.logprobs[positions],
            self.tail_logmass[positions],
            self.draws[positions] if self.draws else None,
        )

    @property
    def k(self) -> int:
        """Stored ids a position."""
        return self.ids.shape[1]


def join_targets(parts: Sequence[Targets]) -> Targets:
    """The positions of all parts, in order; one part at least, all of the same shapes."""

    def all_of(values: Sequence[Any], name: str) -> np.ndarray:
        return np.concatenate([getattr(value, name) for value in values])

    drawn = [part.draws for part in parts if part.draws]
    draws = None
    if drawn:
        draws = Draws(all_of(drawn, "ids"), all_of(drawn, "logprobs"), drawn[0].betas)
    return Targets(
        ids=all_of(parts, "ids"),
        logprobs=all_of(parts, "logprobs"),
        tail_logmass=all_of(parts, "tail_logmass"),
        draws=draws,
    )


def nodes_of(tail_logmass: Any) -> tuple[float, ...]:
    """The β of each of `tail_logmass` [..., nodes]: their number says which nodes they are."""
    return _NODES[tail_logmass.shape[-1]]


def tail_size_logmass(*, vocabulary: int, k: int) -> float:
    """A(0): log of the number of tail ids; −inf when every id is stored."""
    return float(np.log(vocabulary - k)) if vocabulary > k else -np.inf


_SHIFT = {7: 5.0, 9: 2.0}
"""Nats added before the logarithm in `tail_logmass_at`, by the number of nodes: the interpolated
function's last derivative is least there on a real teacher (benchmarks/tail.py)."""


def tail_logmass_at(values: Any, beta: Any, *, xp: Any = np) -> Any:
    """A(β) between the nodes, in nats, exact at the nodes.

    `values` [..., nodes] are A at `nodes_of(values)`; `beta` is a scalar in [0, 1] (T ≥ 1), traced
    or not; the result has shape [...]. An empty tail (−inf) stays −inf without producing NaN,
    also in gradients. `xp` is numpy or jax.numpy.

    Newton's interpolation in β through all nodes, not of A but of log(D + shift) with
    D(β) = A(β) − β·A(1) ≥ 0, which bends less: the largest error is a quarter of that of A itself.
    """
    nodes = nodes_of(values)
    shift = _SHIFT[len(nodes)]
    last = values[..., -1]
    empty = ~xp.isfinite(last)
    safe = xp.where(empty[..., None], xp.zeros_like(values), values)
    last = safe[..., -1]
    # D is negative only by the rounding of a codec.
    bends = [xp.log(xp.maximum(safe[..., i] - b * last, 0.0) + shift) for i, b in enumerate(nodes)]
    for order in range(1, len(nodes)):
        for i in range(len(nodes) - 1, order - 1, -1):
            step = nodes[i] - nodes[i - order]
            bends[i] = (bends[i] - bends[i - 1]) / step
    result = bends[-1]
    for i in range(len(nodes) - 2, -1, -1):
        result = result * (beta - nodes[i]) + bends[i]
    return xp.where(empty, -xp.inf, xp.exp(result) - shift + beta * last)
