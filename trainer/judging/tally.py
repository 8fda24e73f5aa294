"""Means of measures over groups of positions: all, by the next token's frequency, by position.

Only float64 sums for each group are held, whatever the number of positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

BINS = 15
"""Number of equally wide bins of confidence, for the calibration error (Guo et al. 2017)."""
SHARES = (1e-2, 1e-3, 1e-4, 1e-5)
"""Edges of the token groups: a token's share of the training text."""


class Tally:
    """Sums of measures for each group of positions."""

    def __init__(self, groups: Sequence[dict[str, Any]]):
        """`groups` are the fields that describe each group; `means` puts them before its means."""
        self._groups = groups
        self._sums: dict[str, np.ndarray] = {}
        # For each group and bin of confidence: positions, sum of confidence, right positions.
        self._bins = np.zeros((3, len(groups), BINS))

    def add(
        self, group: Int[np.ndarray, " n"], measures: Mapping[str, Shaped[np.ndarray, " n"]]
    ) -> None:
        """Add n positions, each with its group number and its measures (`judging/measures.py`)."""
        size = len(self._groups)
        for name, values in measures.items():
            sums = np.bincount(group, weights=values, minlength=size)
            self._sums[name] = self._sums.get(name, 0) + sums
        confidence = measures["confidence"].astype(np.float64)
        bins = group * BINS + np.minimum((confidence * BINS).astype(int), BINS - 1)
        for i, weights in enumerate((None, confidence, measures["accuracy"])):
            sums = np.bincount(bins, weights=weights, minlength=size * BINS)
            self._bins[i] += sums.reshape(size, BINS)

    def means(self) -> list[dict[str, Any]]:
        """For every group with positions: its fields, `tokens` and the mean of each measure.

        `perplexity`, `ece` and the interval `acceptance` are computed from means.
        """
        counts = self._bins[0].sum(-1)
        return [
            {**self._groups[g], "tokens": int(count), **self._group_means(g, count)}
            for g, count in enumerate(counts)
            if count
        ]

    def _group_means(self, group: int, count: float) -> dict[str, Any]:
        means = {name: float(sums[group] / count) for name, sums in self._sums.items()}
        interval = [means.pop("acceptance_low"), means.pop("acceptance_high")]
        means["perplexity"] = math.exp(min(means["ce"], 700.0))
        _, confident, right = self._bins[:, group]
        means["ece"] = float(np.abs(confident - right).sum() / count)
        return {**means, "acceptance": interval}

    def calibration(self, group: int = 0) -> list[dict[str, Any]]:
        """For every bin with positions: its edges, `tokens`, mean confidence and accuracy."""
        return [
            {"from": i / BINS, "to": (i + 1) / BINS, "tokens": int(n)}
            | {"confidence": confident / n, "accuracy": right / n}
            for i, (n, confident, right) in enumerate(self._bins[:, group].T.tolist())
            if n
        ]


def frequency_groups() -> list[dict[str, Any]]:
    """Fields of the groups by frequency, falling; the last holds tokens that never occur."""
    edges = [1.0, *SHARES, 0.0]
    names = [f"1 in {1 / share:,.0f}" for share in SHARES]
    between = [f"{high} to {low}" for high, low in itertools.pairwise(names)]
    labels = [f"over {names[0]}", *between, f"under {names[-1]}"]
    groups = [
        {"frequency": name, "share_from": low, "share_to": high}
        for name, low, high in zip(labels, edges[1:], edges, strict=False)
    ]
    return [*groups, {"frequency": "never", "share_from": 0.0, "share_to": 0.0}]


def frequency_group(shares: Float[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
    """Group number of each share: `share_from` ≤ share < `share_to`; share 0 has the last group."""
    return np.where(shares > 0, np.sum(shares[..., None] < np.asarray(SHARES), axis=-1), GROUPS - 1)


GROUPS = len(SHARES) + 2


def position_groups(length: int) -> list[dict[str, Any]]:
    """Fields of the groups by position in the document: 0, 1, 2–3, 4–7, … up to `length` − 1."""
    starts = [0, *(1 << i for i in range((length - 1).bit_length()))]
    ends = [*(start - 1 for start in starts[1:]), length - 1]
    return [
        {"position_from": start, "position_to": end}
        for start, end in zip(starts, ends, strict=True)
    ]


def position_group(positions: Int[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
    """Group number of each position: its number of binary digits."""
    return np.frexp(positions)[1].astype(np.int64)
