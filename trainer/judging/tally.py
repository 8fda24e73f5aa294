"""Means of measures over positions: of all, by how frequent the next token is, and by position.

Sums are float64 and of the size of the groups, however many positions there are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

BINS = 15
"""Of confidence, equally wide, for the calibration error (Guo et al. 2017)."""
SHARES = (1e-2, 1e-3, 1e-4, 1e-5)
"""Edges of the groups of tokens by their share of the training text."""


class Tally:
    """Sums by group of positions."""

    def __init__(self, groups: Sequence[dict[str, Any]]):
        """What the groups are called; `judged` puts it before their means."""
        self._groups = groups
        self._sums: dict[str, np.ndarray] = {}
        # Of each group's positions by confidence: how many, their confidence, how many are right.
        self._bins = np.zeros((3, len(groups), BINS))

    def add(
        self, group: Int[np.ndarray, " n"], measures: Mapping[str, Shaped[np.ndarray, " n"]]
    ) -> None:
        """Positions, each in a group, by the names of `decant.trainer.judging.measures`."""
        size = len(self._groups)
        for name, values in measures.items():
            sums = np.bincount(group, weights=values, minlength=size)
            self._sums[name] = self._sums.get(name, 0) + sums
        confidence = measures["confidence"].astype(np.float64)
        bins = group * BINS + np.minimum((confidence * BINS).astype(int), BINS - 1)
        for i, weights in enumerate((None, confidence, measures["accuracy"])):
            found = np.bincount(bins, weights=weights, minlength=size * BINS)
            self._bins[i] += found.reshape(size, BINS)

    def judged(self) -> list[dict[str, Any]]:
        """Of every group that has positions: what it is called, `tokens`, means, and what follows
        from them: perplexity, `ece`, the interval `acceptance`."""
        counts = self._bins[0].sum(-1)
        return [
            {**self._groups[g], "tokens": int(count), **self._means(g, count)}
            for g, count in enumerate(counts)
            if count
        ]

    def _means(self, group: int, count: float) -> dict[str, Any]:
        means = {name: float(sums[group] / count) for name, sums in self._sums.items()}
        interval = [means.pop("acceptance_low"), means.pop("acceptance_high")]
        means["perplexity"] = math.exp(min(means["ce"], 700.0))
        _, confident, right = self._bins[:, group]
        means["ece"] = float(np.abs(confident - right).sum() / count)
        return {**means, "acceptance": interval}

    def calibration(self, group: int = 0) -> list[dict[str, Any]]:
        """Of each bin that has positions, how sure the student was and how often right."""
        return [
            {"from": i / BINS, "to": (i + 1) / BINS, "tokens": int(n)}
            | {"confidence": confident / n, "accuracy": right / n}
            for i, (n, confident, right) in enumerate(self._bins[:, group].T.tolist())
            if n
        ]


def frequency_groups() -> list[dict[str, Any]]:
    """Falling shares of the training text; last the tokens that are not in it."""
    edges = [1.0, *SHARES, 0.0]
    names = [f"1 in {1 / share:,.0f}" for share in SHARES]
    between = [f"{high} to {low}" for high, low in itertools.pairwise(names)]
    called = [f"over {names[0]}", *between, f"under {names[-1]}"]
    groups = [
        {"frequency": name, "share_from": low, "share_to": high}
        for name, low, high in zip(called, edges[1:], edges, strict=False)
    ]
    return [*groups, {"frequency": "never", "share_from": 0.0, "share_to": 0.0}]


def frequency_group(shares: Float[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
    """The number of each share's group: `share_from` ≤ share, but for what is never there."""
    return np.where(shares > 0, np.sum(shares[..., None] < np.asarray(SHARES), axis=-1), GROUPS - 1)


GROUPS = len(SHARES) + 2


def position_groups(length: int) -> list[dict[str, Any]]:
    """By tokens that stand before in the document, doubling: 0, 1, 2–3, 4–7, …"""
    starts = [0, *(1 << i for i in range((length - 1).bit_length()))]
    ends = [*(start - 1 for start in starts[1:]), length - 1]
    return [
        {"position_from": start, "position_to": end}
        for start, end in zip(starts, ends, strict=True)
    ]


def position_group(positions: Int[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
    """The number of each position's group: how many binary digits it has."""
    return np.frexp(positions)[1].astype(np.int64)
