"""How sure the teacher was: over a sample's positions, and row by row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

from decant.pipelines.inspection.entropy import entropies_of
from decant.pipelines.inspection.sampling import Sample
from decant.schemas import Cache
from decant.schemas.disk.layout import COUNTS
from decant.schemas.reading.record_signals import LABELS
from decant.schemas.records.rows import next_tokens

_AT_ONCE = 1 << 22
"""Stored ids that are decoded at once: a cache may store all of a large vocabulary."""
_FEWEST = 1 / 8
"""Share of a row's positions that must have a target, for the row to be called hard or easy."""


@dataclass(frozen=True)
class Statistics:
    """Of the sample's positions that have a target, and of its rows. In nats."""

    sample: Sample
    entropy: Float[np.ndarray, " targets"]
    tail: Float[np.ndarray, " targets"]
    """Probability outside the stored ids at T = 1."""
    row_targets: Int64[np.ndarray, " rows"]
    row_entropy: Float[np.ndarray, " rows"]
    """Mean of a row; NaN for a row without targets."""
    row_surprise: Float[np.ndarray, " rows"]
    """Mean −ln of the probability of the token that came; NaN for a row without targets. A cache
    without label log-probabilities gives a lower bound: of a token that is not stored, the tail's
    whole probability."""

    def by_entropy(self, count: int, *, hardest: bool) -> Int64[np.ndarray, " count"]:
        """Indices into the rows: the `count` hardest or easiest, that one first.

        Rows with few targets are left out, because their mean says little.
        """
        enough = self.row_targets >= max(1, _FEWEST * self.row_targets.max(initial=0))
        candidates = np.flatnonzero(enough)
        order = np.argsort(self.row_entropy[candidates], kind="stable")
        return candidates[order[::-1] if hardest else order][:count]


def statistics_of(cache: Cache, sample: Sample) -> Statistics:
    """Read the sample's targets, a bounded number at once."""
    step = max(1, _AT_ONCE // (cache.manifest.sequence_length * max(1, cache.manifest.logits.k)))
    parts = [
        _read(cache, sample.rows[start : start + step])
        for start in range(0, len(sample.rows), step)
    ]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Statistics(sample, *(columns or [np.zeros(0)] * 5))


def _read(cache: Cache, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    read = {LABELS} if cache.manifest.logits.k else {LABELS, COUNTS}
    batch = cache.read(rows, targets=read & {*cache.targets})
    scored = batch["loss_mask"]
    logprobs = batch["topk_logprobs"][scored]
    labels = next_tokens(batch["tokens"])[scored]
    is_label = (batch["topk_ids"][scored] == labels[:, None]) & np.isfinite(logprobs)
    outside = np.ones(len(labels))  # without stored tokens
    if logprobs.shape[1]:
        outside = np.exp(batch["tail_logmass"][scored][:, -1].astype(np.float64))
    of_label = np.where(is_label, np.exp(logprobs.astype(np.float64)), 0).sum(1)
    p = np.where(is_label.any(1), of_label, outside)
    surprise = -np.log(np.maximum(p, 1e-7))
    if "label_logprobs" in batch:
        exact = batch["label_logprobs"][scored].astype(np.float64)
        surprise = np.where(np.isfinite(exact), -exact, surprise)
    entropy = entropies_of(batch, scored)
    counts = scored.sum(1)
    of_row = np.repeat(np.arange(len(rows)), counts)
    means = (
        np.where(counts, np.bincount(of_row, values, len(rows)) / np.maximum(counts, 1), np.nan)
        for values in (entropy, surprise)
    )
    return entropy, outside, counts, *means
