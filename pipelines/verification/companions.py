"""Compares stored counts and sketches with the plain outputs of the teacher."""

import dataclasses

import numpy as np

from decant.pipelines.verification.measures import Count, Figure, SignalCheck, StoredRow
from decant.pipelines.verification.reference import LAST, SegmentOutput, log_softmax
from decant.pipelines.verification.tolerances import (
    ANY,
    HALF_STEP,
    SKETCH_BIAS,
    SKETCH_HEAD,
    SKETCH_OFFSETS,
    Limits,
)
from decant.schemas import Cache
from decant.schemas.codecs.sketch_field import step_size
from decant.schemas.manifest.manifest import Part
from decant.schemas.manifest.statistics import load_statistic
from decant.schemas.signals import CountsSignal, SketchSignal
from decant.schemas.targets.sketch import (
    BIAS,
    DEVIATIONS,
    HEAD,
    MEAN,
    OFFSETS,
    PROJECTION,
    SketchHead,
    tail_logprobs,
)

LABELS, STARTS = "labels", "counts starts"
"""Besides the arrays of `Cache.read`, what checks get of a row: next tokens, starts of counts."""
HEAD_ARRAYS = ("topk_ids", "topk_logprobs", "tail_logmass")
TEMPERATURES = (1.0, 2.0, 4.0)
_COLUMNS = 4096
"""Columns of the unembedding whose head is compared, at most."""


class CountsCheck(SignalCheck):
    """Each draw is looked up in the teacher's distribution."""

    def __init__(self, name: str, signal: CountsSignal, dtype: str):
        super().__init__(name, dtype)
        self.draws = signal.draws
        self.positions = self.wrong_sums = self.repeated = 0

    def add_segment(self, output: SegmentOutput, stored: StoredRow, at: np.ndarray) -> None:
        """Compare the segment at the row's positions `at`, int64 [n]."""
        here = stored["loss_mask"][at]
        logits, at = output.logits[here], at[here]
        if not len(at):
            return
        ids, counts = stored["count_ids"][at], stored["counts"][at]
        held = counts > 0
        right = counts.sum(1) == self.draws
        self.positions += len(at)
        self.wrong_sums += int((~right).sum())
        self.repeated += int(((np.diff(ids, axis=1) <= 0) & held[:, 1:]).any(1).sum())
        if not right.any():
            return
        of_draw = np.repeat(ids[right].ravel(), counts[right].ravel()).reshape(-1, self.draws)
        ends = np.cumsum(np.exp(log_softmax(logits[right]).astype(np.float64)), axis=1)
        ends /= ends[:, -1:]
        end = np.take_along_axis(ends, of_draw, 1)
        start = np.where(of_draw > 0, np.take_along_axis(ends, np.maximum(of_draw - 1, 0), 1), 0)
        starts = stored[STARTS][at[right]].astype(np.float64)
        points = (np.arange(self.draws) + starts[:, None]) / self.draws
        outside = np.maximum(np.maximum(start - points, points - end), 0)
        self._add("a draw's distance from its id's share", outside, self.rounding.tail)

    def measures(self) -> tuple[list[Figure], list[Count]]:
        """Figures and counts over everything that was added."""
        figures, _ = super().measures()
        of = self.positions
        return figures, [
            Count(self.name, f"counts that do not sum to {self.draws}", self.wrong_sums, of),
            Count(self.name, "ids twice or out of order", self.repeated, of),
        ]


class SketchCheck(SignalCheck):
    """Sketches against the reference's own states, and the head against the unembedding."""

    def __init__(
        self,
        name: str,
        signal: SketchSignal,
        dtype: str,
        cache: Cache,
        part: Part,
        unembedding: np.ndarray,
    ):
        super().__init__(name, dtype)
        self.signal = signal
        root, statistics = cache.path / part.path, part.statistics
        arrays = {
            key: load_statistic(
                root, f"{key}.npy", sha256=statistics[f"{key}.npy"], mirror=cache.mirror
            )
            for key in (MEAN, PROJECTION, HEAD, BIAS, DEVIATIONS, OFFSETS)
            if f"{key}.npy" in statistics
        }
        self.mean = arrays[MEAN].astype(np.float64)
        self.projection = arrays[PROJECTION].astype(np.float64)
        self.deviations = arrays[DEVIATIONS]
        head = arrays[HEAD].astype(np.float32)
        self.head = SketchHead(head, arrays[BIAS], signal.softcap, arrays.get(OFFSETS))
        self._add_head(head, unembedding)
        off = np.abs(arrays[BIAS] - self.mean @ unembedding)
        self._add("b, off from the mean state's logits", off, SKETCH_BIAS)

    def _add_head(self, head: np.ndarray, unembedding: np.ndarray) -> None:
        """A must be Kᵀ·W with Pᵀ·K = 1 for some K, which is solved for on half of the columns."""
        width, vocabulary = unembedding.shape
        count = min(vocabulary, max(_COLUMNS, 4 * width))
        columns = np.linspace(0, vocabulary - 1, count).astype(int)
        solved, compared = columns[::2], columns[1::2]
        w = unembedding.astype(np.float64)
        back, *_ = np.linalg.lstsq(w[:, solved].T, head[:, solved].T, rcond=None)
        size = np.sqrt(np.mean(head.astype(np.float64) ** 2)) or 1.0
        off = np.abs(back.T @ w[:, compared] - head[:, compared]) / size
        self._add("A, off from the unembedding", off, SKETCH_HEAD)

    def add_segment(self, output: SegmentOutput, stored: StoredRow, at: np.ndarray) -> None:
        """Compare the segment at the row's positions `at`, int64 [n]."""
        here = stored["loss_mask"][at]
        logits, at = output.logits[here], at[here]
        if not len(at):
            return
        states = output.hidden[LAST][here].astype(np.float64)
        sketch = stored["sketch"][at, : self.signal.rank]
        off = np.abs(sketch - (states - self.mean) @ self.projection)
        step = step_size(self.deviations, self.signal.step or 1.0)
        stored_limits = HALF_STEP if self.signal.step else Limits(0.0, 0.0, 0.0)
        limits = self.rounding.steps + stored_limits
        self._add("a number's error, in steps", off / step, limits)
        head = {name: stored[name][at] for name in HEAD_ARRAYS}
        for temperature in TEMPERATURES:
            values = _kl(self.head, sketch, logits, temperature=temperature, **head)
            self._add(f"KL of the target at T = {temperature:g}, nats", values, ANY)
            if self.head.offsets is None:
                continue
            plain = dataclasses.replace(self.head, offsets=None)
            more = values - _kl(plain, sketch, logits, temperature=temperature, **head)
            self._add(f"KL that offsets add at T = {temperature:g}, nats", more, SKETCH_OFFSETS)


def _kl(head: SketchHead, sketch, logits, *, temperature: float, **stored) -> np.ndarray:
    """KL at T of the teacher, which has these `logits` [n, V], to what students learn from."""
    p = log_softmax(logits, beta=1 / temperature).astype(np.float64)
    target = tail_logprobs(head, sketch, temperature=temperature, **stored)
    return (np.exp(p) * (p - target)).sum(1)
