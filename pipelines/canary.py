"""Canary rows: does this worker compute what calibration computed, before it commits anything?

A worker with other weights, another library or broken hardware would otherwise write targets
that look right. Compared by KL over the first ids, the rest taken as one bucket.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from schemas.plan import Plan
from schemas.statistics import load_statistic
from schemas.targets import Targets

ROWS = 8
_IDS = 16  # enough to see a difference; all k would be megabytes
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-3}
"""Mean KL in nats that rounding may cause, by compute dtype."""


def canary_arrays(found: Sequence[Targets]) -> dict[str, np.ndarray]:
    """What is frozen of the canary rows' targets, by statistic name."""
    return {
        "canary-ids": np.concatenate([targets.ids[:, :_IDS] for targets in found]),
        "canary-logprobs": np.concatenate([targets.logprobs[:, :_IDS] for targets in found]),
    }


def check_canary(plan: Plan, part: Path, found: Sequence[Targets]) -> None:
    """RuntimeError if this process's targets of the canary rows are not the plan's."""
    ids, logprobs = (
        load_statistic(part, name, sha256=plan.statistics[name])
        for name in ("canary-ids.npy", "canary-logprobs.npy")
    )
    difference = canary_kl(ids, logprobs, found, threshold=plan.signals["logits"].threshold)
    allowed = TOLERANCE[plan.teacher.dtype]
    if not difference <= allowed:
        raise RuntimeError(
            f"{plan.teacher.model}: this worker's targets of {len(found)} canary rows differ from "
            f"the plan's by a KL of {difference:.2g} nats, allowed are {allowed:g}; it runs other "
            "weights or other arithmetic than calibration did. Nothing was written. Use the same "
            "checkpoint on every worker, or capture into a new directory."
        )


def canary_kl(
    ids: np.ndarray,
    logprobs: np.ndarray,
    found: Sequence[Targets],
    *,
    threshold: float | None = None,
) -> float:
    """Mean KL(frozen ‖ found) in nats over the frozen ids [n, ids] and a bucket for the rest.

    An id that is no longer among the found ones counts with the largest log-probability that it
    can have: the least of the found top-k, or that of the threshold below which none is kept.
    """
    found_ids = np.concatenate([targets.ids for targets in found])
    found_logprobs = np.concatenate([targets.logprobs for targets in found])
    if len(found_ids) != len(ids):
        return np.inf
    same = ids[:, :, None] == found_ids[:, None, :]
    ours = np.where(same, found_logprobs[:, None, :], -np.inf).max(axis=2)
    least = found_logprobs[:, -1:] if threshold is None else np.log(threshold)
    there = np.isfinite(logprobs)
    ours = np.where(there, np.maximum(ours, least), 0).astype(np.float64)
    theirs = np.where(there, logprobs, 0).astype(np.float64)
    p, q = (np.where(there, np.exp(values), 0) for values in (theirs, ours))
    rest_p = np.maximum(1 - p.sum(1), 1e-9)
    rest_q = np.maximum(1 - q.sum(1), 1e-9)
    return float(np.mean((p * (theirs - ours)).sum(1) + rest_p * np.log(rest_p / rest_q)))
