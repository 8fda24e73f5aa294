"""Held-out metrics during training: the headline KL, cross-entropy and agreement.

The KL is at T = 1, the headline of `judging/headline.py`, whatever the student's loss.
`results/evaluate.py` measures more after training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import numpy as np

from decant.models.mesh.execution import Execution
from decant.models.mesh.sharding import replicate, split_columns
from decant.models.text.text_bytes import bits_per_byte, bytes_of_ids, label_bytes
from decant.schemas import Cache
from decant.schemas.reading.held import loss_targets
from decant.schemas.reading.record_signals import DRAWS, LABELS
from decant.trainer.config import Loss
from decant.trainer.judging.headline import PREFIX, PRIOR, Estimate, estimate_of, with_headline
from decant.trainer.judging.teacher_reference import taught_on_host, teacher_on_labels
from decant.trainer.loss.batch_fields import to_device
from decant.trainer.loss.chunk_loss import HeadSums
from decant.trainer.loss.objective import Objective, Tables, batch_sums, scheduled_values
from decant.trainer.loss.projections import Parameters
from decant.trainer.loss.sketches import sketch_tables

Evaluator = Callable[[Parameters], dict[str, Any]]
"""Held-out metrics of given parameters."""


NO_TARGETS = "no position of the held-out rows has a target, so nothing can be judged"


def make_evaluator(
    objective: Objective, *, cache: Cache, rows: int | None, batch_rows: int
) -> Evaluator:
    """An evaluator on `rows` held-out rows (None: all), read `batch_rows` at a time.

    Of `objective` only the graph, the vocabulary, the mesh and `chunk_tokens` are used.

    Metrics, in nats a token: heldout_kl, the headline, and heldout_kl_by, its name; the same KL
    under its own name, and heldout_kl_bound; heldout_ce; heldout_teacher_ce, the teacher's own
    (`teacher_on_labels`). Besides heldout_perplexity = exp(ce), heldout_agreement (share of
    positions where student and teacher have the same likeliest token) and heldout_tokens: all
    these over positions with a target. heldout_bits_per_byte is over all positions with a label
    (`models/text/text_bytes.py`). Raises ValueError if the cache has no held-out rows.
    """
    mesh = objective.execution.mesh
    assert mesh is not None
    numbers, estimate = heldout_rows(cache, rows), estimate_of(cache)
    batch_rows += -batch_rows % mesh.size
    chunk_tokens = objective.loss.chunk_tokens
    judging = Objective(
        objective.graph,
        Loss(alpha=1.0, temperature=1.0, tail=estimate.tail, chunk_tokens=chunk_tokens),
        vocabulary=objective.vocabulary,
        bound=estimate.tail == "counts",
        execution=Execution(mesh),
    )
    values = scheduled_values(judging.loss, 0, steps=1)
    tables = Tables()
    if estimate is PRIOR:
        tables = Tables(prior=replicate(np.asarray(cache.tail_prior(), np.float32), mesh))
    elif estimate.tail == "sketch":
        heads = sketch_tables(cache.sketch_heads())
        tables = Tables(sketch=jax.tree.map(lambda table: split_columns(table, mesh), heads))
    bytes_of = bytes_of_ids(cache)
    # The same at every evaluation, so both are computed at the first.
    teacher: dict[str, float] = {}
    text_bytes: list[int] = []

    @jax.jit
    def sums_of(params: Parameters, batch: dict, tables: Tables) -> HeadSums:
        _, totals = batch_sums(judging, params, batch, values=values, tables=tables)
        return totals.head

    def evaluate(params: Parameters) -> dict[str, Any]:
        references, sums, first = [], [], not text_bytes
        # `teacher_on_labels` reads draws and labels.
        held = [name for name in (DRAWS, LABELS) if name in cache.targets]
        read = dict.fromkeys((*loss_targets(estimate.tail), *held))
        for batch in heldout_batches(cache, numbers, batch_rows=batch_rows, targets=read):
            on_device = to_device(batch, mesh=mesh, tail=estimate.tail)
            sums.append([float(x) for x in sums_of(params, on_device, tables)])
            if first:
                reference, taught = teacher_on_labels(batch), taught_on_host(batch)
                references.append({n: x[taught].sum() for n, x in reference.items()})
                text_bytes.append(label_bytes(batch, bytes_of))
        totals = HeadSums(*np.sum(sums, axis=0))
        if not totals.taught:
            raise ValueError(NO_TARGETS)
        for name in references[0] if references else ():
            teacher[PREFIX + name] = float(sum(x[name] for x in references) / totals.taught)
        bits = bits_per_byte(float(totals.ce), sum(text_bytes), prefix=PREFIX)
        return _metrics(totals, estimate) | bits | teacher

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
    cache: Cache, numbers: np.ndarray, *, batch_rows: int, targets: Collection[str] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The rows as batches from `Cache.read`, all of one shape, so that one program is compiled.

    The last batch is filled up with repeats of its first row, whose `loss_mask` is False.
    """
    for start in range(0, len(numbers), batch_rows):
        chosen = numbers[start : start + batch_rows]
        fill = np.repeat(chosen[:1], batch_rows - len(chosen))
        batch = cache.read(np.concatenate([chosen, fill]), targets=targets)
        batch["loss_mask"][len(chosen) :] = False
        yield batch


def _metrics(totals: HeadSums, estimate: Estimate) -> dict[str, Any]:
    count = float(totals.taught)
    ce = float(totals.ce_taught) / count
    metrics = {
        estimate.metric: float(totals.kl) / count,
        "heldout_kl_bound": float(totals.kl_uncorrected) / count,
        "heldout_ce": ce,
        "heldout_perplexity": math.exp(min(ce, 700.0)),
        "heldout_agreement": float(totals.agreement) / count,
        "heldout_tokens": int(count),
    }
    return with_headline(metrics, estimate)
