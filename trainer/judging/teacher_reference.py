"""The teacher's own figures on held-out text, from its stored targets.

They are the reference for a student's: a perfect copy of the teacher would have this cross-entropy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from decant.schemas.records.rows import next_tokens
from decant.schemas.targets.targets import nodes_of
from decant.schemas.targets.unmatched import UNMATCHED


def teacher_on_labels(
    batch: Mapping[str, Shaped[np.ndarray, ...]],
) -> dict[str, Float[np.ndarray, "row position"]]:
    """The teacher's measures at each position of a batch from `Cache.read`; arbitrary where no
    target is.

    `teacher_ce`: −log p of the next token, in nats. It is stored in caches of release 0.10 and
    later, up to the codec's rounding. In older ones: if the token is stored or drawn, this is exact
    but for the codec's rounding. Any other token gets what a token of this tail has on average,
    −(A(1) − A(β)) / (1 − β) with the largest stored β < 1: A's slope is the tail's mean log p. It
    has no more than the least likely stored token.
    `teacher_ce_bound`: the same, but other tokens get all that they can have, so the mean is never
    above the true one. `teacher_known`: 1 where it is exact. `teacher_accuracy`: 1 where the
    teacher's likeliest token is the next token.
    """
    labels = next_tokens(batch["tokens"])[..., None]
    if not batch["topk_ids"].shape[-1]:
        return _beside_counts(batch, labels[..., 0])
    stored = np.isfinite(batch["topk_logprobs"])
    exact = _logprob_of(labels, batch["topk_ids"], batch["topk_logprobs"])
    if "tail_ids" in batch:
        drawn = _logprob_of(labels, batch["tail_ids"], batch["tail_logprobs"])
        exact = np.maximum(exact, drawn)
    if "label_logprobs" in batch:  # −inf in parts of older releases
        exact = np.where(np.isfinite(batch["label_logprobs"]), batch["label_logprobs"], exact)
    known = np.isfinite(exact)
    masses = batch["tail_logmass"].astype(np.float64)
    masses = np.where(np.isfinite(masses), masses, 0.0)  # an empty tail: every token is known
    last = np.where(stored, batch["topk_logprobs"], np.inf).min(-1)
    most = np.minimum(last, masses[..., -1])
    *_, below, one = nodes_of(masses)
    mean = (masses[..., -1] - masses[..., -2]) / (one - below)
    measures = {
        "teacher_ce": -np.where(known, exact, np.minimum(mean, most)),
        "teacher_ce_bound": -np.where(known, exact, most),
        "teacher_known": known,
        "teacher_accuracy": stored[..., 0] & (batch["topk_ids"][..., 0] == labels[..., 0]),
    }
    return {name: np.asarray(values, np.float64) for name, values in measures.items()}


def taught_on_host(
    batch: Mapping[str, Shaped[np.ndarray, ...]],
) -> Bool[np.ndarray, "row position"]:
    """Counted positions with a teacher's targets, as `BatchTargets.taught`."""
    there = np.isfinite(batch["topk_logprobs"]).any(-1)
    if "counts" in batch:
        there |= (batch["counts"] > 0).any(-1)
    if UNMATCHED in batch:
        there |= np.isfinite(batch[UNMATCHED]).any(-1)
    return there & batch["loss_mask"]


def _beside_counts(
    batch: Mapping[str, Shaped[np.ndarray, ...]], labels: Shaped[np.ndarray, "row position"]
) -> dict[str, Float[np.ndarray, "row position"]]:
    """The same for a cache without a top-k, which has label log-probabilities."""
    own = np.asarray(batch["label_logprobs"], np.float64)
    there = np.isfinite(own)
    largest = batch["counts"].argmax(-1)[..., None]
    first = np.take_along_axis(batch["count_ids"], largest, -1)[..., 0]
    ce = np.where(there, -own, 0.0)
    return {
        "teacher_ce": ce,
        "teacher_ce_bound": ce,
        "teacher_known": there.astype(np.float64),
        "teacher_accuracy": (there & (first == labels)).astype(np.float64),
    }


def teacher_ce(metrics: Mapping[str, Any]) -> str | None:
    """The teacher's held-out cross-entropy as text, marked ≈ where it is estimated; None if these
    metrics, of releases before 0.9, have none."""
    value = metrics.get("heldout_teacher_ce")
    return None if value is None else f"{teacher_sign(metrics)}{value:.4f}"


def teacher_sign(metrics: Mapping[str, Any]) -> str:
    """`≈ ` before the teacher's cross-entropy and perplexity; empty if they are exact."""
    return "" if metrics["heldout_teacher_known"] == 1 else "≈ "


def _logprob_of(
    labels: Shaped[np.ndarray, "row position one"],
    ids: Shaped[np.ndarray, "row position n"],
    logprobs: Shaped[np.ndarray, "row position n"],
) -> Float[np.ndarray, "row position"]:
    """The log-probability stored for each label; −inf if there is none."""
    return np.where(ids == labels, logprobs, -np.inf).max(-1)
