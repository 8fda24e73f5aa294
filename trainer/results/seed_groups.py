"""Runs that differ in the seed only, as one group: shown as one line with a band, or one mean."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decant.trainer.results.run_summary import RunSummary

SEED = "data.seed"
_SEED_IN_NAME = re.compile(r"[-_. ]?seed[-_= ]?\d+")


@dataclass(frozen=True)
class Group:
    """One run, or several that differ in the seed only."""

    number: int
    """Place in the report, which decides colour and dashes."""
    runs: tuple[RunSummary, ...]

    @property
    def name(self) -> str:
        """The run's name; of several, the first one's without the seed."""
        first = self.runs[0].name
        if len(self.runs) == 1:
            return first
        return f"{_SEED_IN_NAME.sub('', first) or first} ({len(self.runs)} seeds)"

    def values(self, of: Callable[[RunSummary], Any]) -> list[Any]:
        """What `of` gives for each run, without those for which it is None."""
        return [value for run in self.runs if (value := of(run)) is not None]

    def mean(self, of: Callable[[RunSummary], float | None]) -> float | None:
        """The mean over the runs; None if no run has a value."""
        values = self.values(of)
        return float(np.mean(values)) if values else None


def group_by_seed(runs: Sequence[RunSummary]) -> list[Group]:
    """The groups in the order of their first runs."""
    groups: dict[str, list[RunSummary]] = {}
    for run in runs:
        caches = [cache["cache_id"] for cache in run.caches]
        settings = {key: value for key, value in run.settings.items() if key != SEED}
        groups.setdefault(json.dumps([settings, caches], sort_keys=True), []).append(run)
    return [Group(number, tuple(one)) for number, one in enumerate(groups.values())]


def mean_and_band(
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, mean, lowest and highest y of several curves, at the x that all of them have.

    A curve is (x, y) with x rising. NaN in one curve is NaN in the mean.
    """
    x = curves[0][0]
    for other, _ in curves[1:]:
        x = np.intersect1d(x, other)
    y = np.array([ys[np.isin(xs, x)] for xs, ys in curves]).reshape(len(curves), len(x))
    return x, y.mean(0), y.min(0), y.max(0)
