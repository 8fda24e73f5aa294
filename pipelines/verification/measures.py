"""What `verify` measures of one signal: figures of errors, and counts of wrong items."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from decant.pipelines.verification.reference import SegmentOutput
from decant.pipelines.verification.tolerances import ROUNDING, Limits


@dataclass(frozen=True)
class Figure:
    """One error measure of one signal over all compared positions."""

    signal: str
    what: str
    mean: float
    p99: float
    max: float
    allowed: Limits

    @property
    def fine(self) -> bool:
        """Whether mean, p99 and max are within their limits; NaN is not."""
        limits = self.allowed
        return self.mean <= limits.mean and self.p99 <= limits.p99 and self.max <= limits.max


@dataclass(frozen=True)
class Count:
    """A number of wrong items of one signal."""

    signal: str
    what: str
    wrong: int
    of: int
    """Items checked."""
    most: int = 0
    """Wrong items that are allowed."""
    ties: int = 0
    """Items that are too close to decide; they are not counted as wrong."""

    @property
    def fine(self) -> bool:
        """Whether no more than `most` items are wrong."""
        return self.wrong <= self.most


StoredRow = dict[str, np.ndarray]
"""One row from `Cache.read`; the arrays have no leading row axis."""


class SignalCheck:
    """Collects the errors of one signal, segment by segment."""

    def __init__(self, name: str, dtype: str):
        self.name = name
        self.rounding = ROUNDING[dtype]
        self.errors: dict[str, list[np.ndarray]] = {}
        self.limits: dict[str, Limits] = {}
        self.not_zero = 0
        self.must_be_zero = 0

    def add_segment(self, output: SegmentOutput, stored: StoredRow, at: np.ndarray) -> None:
        """Compare the segment at the row's positions `at`, int64 [n]."""
        raise NotImplementedError

    def add_row(self, stored: StoredRow) -> None:
        """Check, where the signal stores such positions, that unread positions hold zeros."""

    def measures(self) -> tuple[list[Figure], list[Count]]:
        """Figures and counts over everything that was added."""
        return [self._figure(what, errors) for what, errors in self.errors.items()], []

    def _add(self, what: str, errors: np.ndarray, limits: Limits) -> None:
        self.errors.setdefault(what, []).append(np.ravel(errors))
        self.limits[what] = limits

    def _figure(self, what: str, chunks: Iterable[np.ndarray]) -> Figure:
        errors = np.concatenate(list(chunks))
        limits = self.limits[what].of_few(len(errors))
        # No positions to compare count as no error. NaN stays NaN, which is not fine.
        values = errors if len(errors) else np.zeros(1)
        p99 = float(np.quantile(values, 0.99))
        return Figure(self.name, what, float(values.mean()), p99, float(values.max()), limits)
