"""Standard errors of means over held-out positions, with rows as the independent units.

Positions of a row depend on each other, so the spread of rows is what counts. A mean over positions
is Σ sums / Σ counts over rows; its standard error is that of a ratio (linearised).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def standard_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Standard error of Σ sums / Σ counts, each a row's; None for fewer than two rows.

    √( R/(R − 1) · Σ_r (sum_r − mean · count_r)² ) / Σ count_r
    """
    x, n = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    x, n = x[n > 0], n[n > 0]
    if len(x) < 2:
        return None
    residual = x - x.sum() / n.sum() * n
    return float(np.sqrt(len(x) / (len(x) - 1) * np.square(residual).sum()) / n.sum())


def paired_difference(
    ours: Mapping[str, Any], others: Mapping[str, Any], *, by: str
) -> tuple[float, float] | None:
    """How much higher the KL of `ours` is than that of `others`, and its standard error.

    Both are evaluations. Much of a mean's standard error is how hard its rows are; the difference
    row by row is free of it. None unless both have the estimate called `by` on the same rows.
    """
    a, b = ours.get("kl_by_row"), others.get("kl_by_row")
    same = ours.get("cache_id") == others.get("cache_id")
    same &= ours.get("heldout_kl_by") == others.get("heldout_kl_by") == by
    if not a or not b or not same or a["tokens"] != b["tokens"]:
        return None
    sums = np.subtract(a["sums"], b["sums"])
    error = standard_error(sums.tolist(), a["tokens"])
    return None if error is None else (float(sums.sum() / np.sum(a["tokens"])), error)
