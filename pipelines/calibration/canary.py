"""Canary rows: does this worker compute what calibration computed, before it commits anything?

A worker with other weights, another library or broken hardware would otherwise write targets
that look right. Compared by KL over the first ids, the rest taken as one bucket.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from decant.schemas.manifest.plan import CANARY, Plan
from decant.schemas.manifest.statistics import load_statistic
from decant.schemas.targets.targets import Targets

ROWS = 8
IDS = 16  # enough to see a difference; all k would be megabytes
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-3}
"""Mean KL in nats that rounding may cause, by compute dtype."""


def is_canary(statistic: str) -> bool:
    """Whether a statistic is one that workers are compared with."""
    return statistic.startswith(CANARY)


def canary_arrays(found: Sequence[Targets]) -> dict[str, np.ndarray]:
    """What is frozen of the canary rows' targets, by statistic name."""
    return {
        "canary-ids": np.concatenate([targets.ids[:, :IDS] for targets in found]),
        "canary-logprobs": np.concatenate([targets.logprobs[:, :IDS] for targets in found]),
    }


def check_canary(plan: Plan, part: Path, found: Sequence[Targets]) -> None:
    """RuntimeError if this process's targets of the canary rows are not the plan's."""
    ids, logprobs = (
        load_statistic(part, name, sha256=plan.statistics[name])
        for name in ("canary-ids.npy", "canary-logprobs.npy")
    )
    difference = canary_kl(ids, logprobs, found)
    allowed = TOLERANCE[plan.teacher.dtype]
    if not difference <= allowed:
        raise RuntimeError(
            f"{plan.teacher.model}: this worker's targets of {len(found)} canary rows differ from "
            f"the plan's by a KL of {difference:.2g} nats, allowed are {allowed:g}; it runs other "
            "weights or other arithmetic than calibration did. Nothing was written. Use the same "
            "checkpoint on every worker, or capture into a new directory."
        )


def canary_kl(ids: np.ndarray, logprobs: np.ndarray, found: Sequence[Targets]) -> float:
    """Mean KL(frozen ‖ found) in nats over the frozen ids [n, ids] and a bucket for the rest.

    An id that is no longer among the found top-k counts with the least found log-probability.
    """
    found_ids = np.concatenate([targets.ids for targets in found])
    found_logprobs = np.concatenate([targets.logprobs for targets in found])
    if len(found_ids) != len(ids):
        return np.inf
    same = ids[:, :, None] == found_ids[:, None, :]
    ours = np.where(same, found_logprobs[:, None, :], -np.inf).max(axis=2)
    ours = np.maximum(ours, found_logprobs[:, -1:]).astype(np.float64)
    theirs = logprobs.astype(np.float64)
    rest_p = np.maximum(1 - np.exp(theirs).sum(1), 1e-9)
    rest_q = np.maximum(1 - np.exp(ours).sum(1), 1e-9)
    head = (np.exp(theirs) * (theirs - ours)).sum(1)
    return float(np.mean(head + rest_p * np.log(rest_p / rest_q)))
