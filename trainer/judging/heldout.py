"""Held-out metrics during training: a KL bound, cross-entropy and agreement.

The KL is at T = 1 with the tail as one category, a lower bound of the true KL. Every cache has
the arrays for it, whatever the student's loss. `results/evaluate.py` measures more after training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from decant.models.mesh.execution import Execution
from decant.schemas import Cache
from decant.trainer.config import Loss
from decant.trainer.loss.batch_fields import to_device
from decant.trainer.loss.chunk_loss import HeadSums
from decant.trainer.loss.objective import Objective, batch_sums, scheduled_values
from decant.trainer.loss.projections import Parameters

Evaluator = Callable[[Parameters], dict[str, Any]]
"""Held-out metrics of given parameters."""


NO_TARGETS = "no position of the held-out rows has a target, so nothing can be judged"


def make_evaluator(
    objective: Objective, *, cache: Cache, rows: int | None, batch_rows: int
) -> Evaluator:
    """An evaluator on `rows` held-out rows (None: all), read `batch_rows` at a time.

    Of `objective` only the graph, the vocabulary, the mesh and `chunk_tokens` are used.

    Metrics: heldout_kl_bound and heldout_ce in nats a token, heldout_perplexity = exp(ce),
    heldout_agreement (share of positions where student and teacher have the same likeliest token)
    and heldout_tokens. Raises ValueError if the cache has no held-out rows.
    """
    mesh = objective.execution.mesh
    assert mesh is not None
    numbers = heldout_rows(cache, rows)
    batch_rows += -batch_rows % mesh.size
    chunk_tokens = objective.loss.chunk_tokens
    judging = Objective(
        objective.graph,
        Loss(alpha=1.0, temperature=1.0, tail="bucket", chunk_tokens=chunk_tokens),
        vocabulary=objective.vocabulary,
        execution=Execution(mesh),
    )
    values = scheduled_values(judging.loss, 0, steps=1)

    @jax.jit
    def sums_of(params: Parameters, batch: dict) -> HeadSums:
        _, totals = batch_sums(judging, params, batch, values=values)
        return totals.head

    def evaluate(params: Parameters) -> dict[str, Any]:
        batches = (
            sums_of(params, to_device(batch, mesh=mesh, tail="bucket"))
            for batch in heldout_batches(cache, numbers, batch_rows=batch_rows)
        )
        totals = HeadSums(*np.sum([[float(x) for x in sums] for sums in batches], axis=0))
        return _metrics(totals)

    return evaluate


def spread_rows(rows: np.ndarray, count: int | None) -> np.ndarray:
    """`count` of the rows at even distances (None: all); the choice depends on the cache alone."""
    if count is None or count >= len(rows):
        return rows
    return rows[np.arange(count) * len(rows) // count]


def heldout_rows(cache: Cache, count: int | None) -> np.ndarray:
    """`count` held-out rows (None: all), the same for every student of the cache.

    Raises ValueError if the cache has none.
    """
    numbers = spread_rows(cache.rows(split="heldout"), count)
    if not len(numbers):
        raise ValueError(
            f"{cache.path}: no held-out rows to judge a student on. Train without judging "
            "(--heldout-rows 0), or capture with a larger --corpus.heldout into another output"
        )
    return numbers


def heldout_batches(
    cache: Cache, numbers: np.ndarray, *, batch_rows: int
) -> Iterator[dict[str, np.ndarray]]:
    """The rows as batches from `Cache.read`, all of one shape, so that one program is compiled.

    The last batch is filled up with repeats of its first row, whose `loss_mask` is False.
    """
    for start in range(0, len(numbers), batch_rows):
        chosen = numbers[start : start + batch_rows]
        fill = np.repeat(chosen[:1], batch_rows - len(chosen))
        batch = cache.read(np.concatenate([chosen, fill]))
        batch["loss_mask"][len(chosen) :] = False
        yield batch


def _metrics(totals: HeadSums) -> dict[str, Any]:
    count = float(totals.count)
    if not count:
        raise ValueError(NO_TARGETS)
    ce = float(totals.ce) / count
    return {
        "heldout_kl_bound": float(totals.kl) / count,
        "heldout_ce": ce,
        "heldout_perplexity": math.exp(min(ce, 700.0)),
        "heldout_agreement": float(totals.agreement) / count,
        "heldout_tokens": int(count),
    }
