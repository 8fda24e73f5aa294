"""The targets of a position (signal `logits`): top-k, the tail's mass at any T, and tail draws.

Log-probabilities are natural, taken at T = 1 and normalised over the full vocabulary.
β = 1/T. The tail is the vocabulary outside the stored top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decant.schemas.targets.draws import Draws

BETAS: tuple[float, ...] = (0.0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1.0)
"""β of the nodes at which the tail's mass is stored. β = 0 counts the tail's ids."""

EIGHTHS: tuple[float, ...] = tuple(n / 8 for n in range(9))
"""The finer nodes of profile `lossless`. Interpolating A(β) between them costs at most 2e-6 nats of
KL at every position (benchmarks/tail.py). `BETAS` exceeds that at a few positions, by less than
the rounding of the other profiles' levels."""

_NODES = {len(nodes): nodes for nodes in ((), BETAS, EIGHTHS)}


@dataclass(frozen=True)
class Targets:
    """The targets of n scored positions.

    `ids` int32 [n, k]: in descending log-probability, ties by ascending id.
    `logprobs` float32 [n, k]: in nats.
    `tail_logmass` float32 [n, nodes]: A(β) = log Σ_{v in tail} exp(β·logp(v)) in nats, at each of
    `BETAS` (7) or `EIGHTHS` (9); −inf for an empty tail. [n, 0] if k = 0.
    `draws`: the tail draws, None if none are stored.
    `label_logprobs` float32 [n]: of the text's next token, in nats; None if not stored.
    `sizes` [n]: ids of each position, if they differ; the entries after them are id 0 with −inf,
    and a position's tail is what is outside its own ids. None: all have k.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    tail_logmass: np.ndarray
    draws: Draws | None = None
    label_logprobs: np.ndarray | None = None
    sizes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, positions: slice | np.ndarray) -> "Targets":
        return Targets(
            self.ids[positions],
            self.logprobs[positions],
            self.tail_logmass[positions],
            self.draws[positions] if self.draws else None,
            None if self.label_logprobs is None else self.label_logprobs[positions],
            None if self.sizes is None else self.sizes[positions],
        )

    @property
    def k(self) -> int:
        """Stored ids per position."""
        return self.ids.shape[1]


def cut_to_k(targets: Targets, k: int) -> Targets:
    """The targets if they have k ids; without ids, tail and draws for k = 0."""
    if targets.k == k:
        return targets
    assert not k
    nothing = np.zeros((len(targets), 0), np.float32)
    return Targets(nothing.astype(np.int32), nothing, nothing, None, targets.label_logprobs)


def join_targets(parts: Sequence[Targets]) -> Targets:
    """The positions of all `parts`, in order. At least one part; all with equal k, m and nodes."""

    def all_of(values: Sequence[Any], name: str) -> np.ndarray:
        return np.concatenate([getattr(value, name) for value in values])

    of_parts = [part.draws for part in parts if part.draws]
    draws = None
    if of_parts:
        draws = Draws(all_of(of_parts, "ids"), all_of(of_parts, "logprobs"), of_parts[0].betas)
    return Targets(
        ids=all_of(parts, "ids"),
        logprobs=all_of(parts, "logprobs"),
        tail_logmass=all_of(parts, "tail_logmass"),
        draws=draws,
        label_logprobs=None
        if any(part.label_logprobs is None for part in parts)
        else all_of(parts, "label_logprobs"),
        sizes=None if any(part.sizes is None for part in parts) else all_of(parts, "sizes"),
    )


def nodes_of(tail_logmass: Any) -> tuple[float, ...]:
    """The β of each node of `tail_logmass` [..., nodes], known from their number; () for 0."""
    return _NODES[tail_logmass.shape[-1]]


def tail_size_logmass(*, vocabulary: int, k: int) -> float:
    """A(0), the log of the number of tail ids; −inf if every id is stored."""
    return float(np.log(vocabulary - k)) if vocabulary > k else -np.inf


_SHIFT = {7: 5.0, 9: 2.0}
"""Nats added before the logarithm in `tail_logmass_at`, by the number of nodes. On a real teacher
these values minimise the last derivative of the interpolated function (benchmarks/tail.py)."""


def tail_logmass_at(values: Any, beta: Any, *, xp: Any = np) -> Any:
    """A(β) in nats, [...], interpolated between the nodes and exact at the nodes.

    `values` [..., nodes] are A at `nodes_of(values)`. `beta` is a scalar in [0, 1] (T ≥ 1) and may
    be traced. An empty tail (−inf) stays −inf without NaN, also in gradients. `xp` is numpy,
    jax.numpy or torch.

    Newton interpolation in β through all nodes. It interpolates log(D + shift) with
    D(β) = A(β) − β·A(1) ≥ 0, which bends less than A: its largest error is a quarter of that of
    interpolating A.
    """
    nodes = nodes_of(values)
    shift = _SHIFT[len(nodes)]
    last = values[..., -1]
    empty = ~xp.isfinite(last)
    safe = xp.where(empty[..., None], xp.zeros_like(values), values)
    last = safe[..., -1]
    # A codec's rounding can make D slightly negative.
    excess = [xp.clip(safe[..., i] - b * last, 0.0, None) for i, b in enumerate(nodes)]
    bends = [xp.log(x + shift) for x in excess]
    for order in range(1, len(nodes)):
        for i in range(len(nodes) - 1, order - 1, -1):
            step = nodes[i] - nodes[i - order]
            bends[i] = (bends[i] - bends[i - 1]) / step
    result = bends[-1]
    for i in range(len(nodes) - 2, -1, -1):
        result = result * (beta - nodes[i]) + bends[i]
    return xp.where(empty, -xp.inf, xp.exp(result) - shift + beta * last)
