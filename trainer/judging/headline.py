"""The headline: the one KL to the teacher that students are compared by, and its name.

A cache allows several estimates of the same KL (at T = 1, in nats a token), which differ by how
they treat the teacher's tail. Training, `keep.best`, sweeps, reports and model cards all show and
compare the first of `ESTIMATES` that every held-out position of the cache allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from decant.schemas import Cache
from decant.schemas.signals import SketchSignal
from decant.served_losses import Tail

PREFIX = "heldout_"
"""What the names of held-out metrics begin with in `metrics.jsonl` and `evaluation.json`."""


@dataclass(frozen=True)
class Estimate:
    """One way to estimate the KL."""

    name: str
    """A word that is always shown beside the value."""
    measure: str
    """Name of the value in `judging/measures.py`."""
    meaning: str
    tail: Tail
    """The loss's treatment of the tail whose forward KL is this estimate."""

    @property
    def metric(self) -> str:
        """Name of the value in `metrics.jsonl` and `evaluation.json`."""
        return PREFIX + self.measure

    @property
    def title(self) -> str:
        """`KL (draws)`."""
        return f"KL ({self.name})"


DENSE = Estimate("dense", "kl_dense", "the probability of every token is stored", "bucket")
FULL = Estimate("full sketch", "kl_full", "a sketch holds all of the tail's shape", "sketch")
DRAWS = Estimate("draws", "kl_unbiased", "right on average, from draws of the tail", "sampled")
COUNTS = Estimate(
    "counts", "kl_counts", "right on average, from draws of the whole distribution", "counts"
)
SKETCH = Estimate("sketch", "kl_sketch", "the shape of each tail as its sketch has it", "sketch")
PRIOR = Estimate("prior", "kl_estimate", "as if each tail had the corpus's mean shape", "prior")
BOUND = Estimate("bound", "kl_bound", "at least this: the tail counts as one token", "bucket")
TO_COUNTS = Estimate(
    "to counts", "kl_to_counts", "to the counts, without a top-k; on average too high", "counts"
)
ESTIMATES = (DENSE, FULL, DRAWS, COUNTS, SKETCH, PRIOR, TO_COUNTS, BOUND)
"""The best first. A new kind of target adds its estimate here and in `estimate_of`."""


def estimate_of(cache: Cache) -> Estimate:
    """The first estimate that all held-out positions of a cache allow.

    A cache whose parts differ (some with draws, some without) gets one that all parts allow: an
    estimate that silently became a bound at some positions would compare nothing.
    """
    parts = [
        part
        for part in cache.manifest.parts
        if any(unit.split == "heldout" for _, unit in part.numbered_units)
    ] or cache.manifest.parts
    if all(part.logits.k >= cache.manifest.vocabulary_size for part in parts):
        return DENSE
    if not all(part.logits.k for part in parts):
        return TO_COUNTS
    signals = cache.manifest.signals
    sketch = signals.get(SKETCH.tail)
    if isinstance(sketch, SketchSignal) and sketch.rank == sketch.teacher_width:
        return FULL
    if all(part.logits.draws for part in parts):
        return DRAWS
    if held := [each for each in (COUNTS, SKETCH) if each.tail in signals]:
        return held[0]
    return PRIOR if cache.has_tail_prior else BOUND


def common_estimate(metrics: Iterable[Mapping[str, Any]]) -> Estimate:
    """The first estimate that all these held-out metrics hold, to compare like with like.

    Metrics of releases before 0.9 hold the bound only. Without one in common: the bound.
    """
    lines = list(metrics) or [{}]
    return next((each for each in ESTIMATES if all(each.metric in x for x in lines)), BOUND)


def with_headline(metrics: Mapping[str, Any], estimate: Estimate) -> dict[str, Any]:
    """Held-out metrics with the headline as `heldout_kl`, and its name as `heldout_kl_by`."""
    return {"heldout_kl": metrics[estimate.metric], "heldout_kl_by": estimate.name, **metrics}
