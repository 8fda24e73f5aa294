"""Canary rows: before its first unit, a worker must give the same targets for them as calibration.

Otherwise a worker with other weights, another library version or broken hardware would write
targets that look right. Targets are compared by KL over the first ids and a bucket for the rest.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from decant.schemas.manifest.plan import CANARY, Plan
from decant.schemas.manifest.statistics import load_statistic
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.targets import Targets

ROWS = 8
"""Canary rows of a part."""
IDS = 16
"""Ids stored for a position: enough to show a difference; all k ids would take megabytes."""
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-3}
"""Mean KL in nats that rounding may cause, by compute dtype."""


def comparable(spec: TargetSpec | None) -> TargetSpec:
    """The targets to compute for canary rows, by what a capture stores of them."""
    if spec is None:
        return TargetSpec(IDS)
    return spec if spec.k else dataclasses.replace(spec, k=IDS)


def is_canary(statistic: str) -> bool:
    """Whether the statistics file `statistic` holds canary targets."""
    return statistic.startswith(CANARY)


def canary_arrays(rows: Sequence[Targets]) -> dict[str, np.ndarray]:
    """The canary rows' targets that are stored with the plan, by name of the statistic."""
    return {
        "canary-ids": np.concatenate([targets.ids[:, :IDS] for targets in rows]),
        "canary-logprobs": np.concatenate([targets.logprobs[:, :IDS] for targets in rows]),
    }


def check_canary(plan: Plan, part: Path, rows: Sequence[Targets]) -> None:
    """Compare `rows`, this process's targets of the canary rows, with the plan's.

    RuntimeError if they differ by more than TOLERANCE.
    """
    ids, logprobs = (
        load_statistic(part, name, sha256=plan.statistics[name])
        for name in ("canary-ids.npy", "canary-logprobs.npy")
    )
    difference = canary_kl(ids, logprobs, rows)
    allowed = TOLERANCE[plan.teacher.dtype]
    if not difference <= allowed:
        raise RuntimeError(
            f"{plan.teacher.model}: this worker's targets of {len(rows)} canary rows differ from "
            f"the plan's by a KL of {difference:.2g} nats; at most {allowed:g} is allowed. It runs "
            "other weights or other arithmetic than calibration did. Nothing was written. Use the "
            "same checkpoint on every worker, or capture into a new directory."
        )


def canary_kl(ids: np.ndarray, logprobs: np.ndarray, rows: Sequence[Targets]) -> float:
    """Mean KL(plan ‖ rows) in nats over the plan's `ids` [n, IDS] and a bucket for the rest.

    `logprobs` [n, IDS] are the plan's. An id outside the top-k of `rows` counts with their least
    log-probability. Infinite if the number of positions differs.
    """
    row_ids = np.concatenate([targets.ids for targets in rows])
    row_logprobs = np.concatenate([targets.logprobs for targets in rows])
    if len(row_ids) != len(ids):
        return np.inf
    same = ids[:, :, None] == row_ids[:, None, :]
    log_q = np.where(same, row_logprobs[:, None, :], -np.inf).max(axis=2)
    log_q = np.maximum(log_q, row_logprobs[:, -1:]).astype(np.float64)
    log_p = logprobs.astype(np.float64)
    rest_p = np.maximum(1 - np.exp(log_p).sum(1), 1e-9)
    rest_q = np.maximum(1 - np.exp(log_q).sum(1), 1e-9)
    head = (np.exp(log_p) * (log_p - log_q)).sum(1)
    return float(np.mean(head + rest_p * np.log(rest_p / rest_q)))
