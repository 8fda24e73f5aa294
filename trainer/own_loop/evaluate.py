"""Judging any model on a cache's held-out rows, with the measures of the command `evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from decant.command_line.checks import check_values
from decant.schemas import Cache, open_cache
from decant.schemas.reading.held import held_by
from decant.served_losses import Asked
from decant.trainer.config import Evaluate
from decant.trainer.judging.measures import MeasureInputs, Measures, chunk_measures
from decant.trainer.judging.whole import judge_heldout, measure_inputs
from decant.trainer.loss.batch_fields import TARGETS, check_targets
from decant.trainer.loss.position_chunks import (
    cut_positions,
    flatten_rows,
    join_positions,
    positions_at_once,
)
from decant.trainer.loss.settings import Loss
from decant.trainer.loss.targets import BatchTargets

Logits = Callable[[Int[Array, "b s"], Int[Array, "b s"], Int[Array, "b s"]], Any]
"""From tokens, segment ids and positions to logits [rows, S, columns]."""


def evaluate(
    cache: Cache | str | Path,
    logits: Logits,
    *,
    heldout_rows: int | None = Evaluate.heldout_rows,
    batch_rows: int = Evaluate.batch_rows,
    temperature: float = 1.0,
    quiet: bool = False,
) -> dict[str, Any]:
    """The measures of any model on held-out rows; those that `decant evaluate` gives for a run.

    ```python
    @jax.jit
    def logits(tokens, segment_ids, positions):
        return student(params, tokens, segment_ids, positions)

    decant.evaluate("runs/cache", logits)["heldout_kl"]
    ```

    Args:
        cache: an open cache, or the path of one.
        logits: called as `logits(tokens, segment_ids, positions)` with int32 JAX arrays
            [batch_rows, S]. It returns logits [batch_rows, S, columns] as a JAX or numpy array, of
            any float type; those of position t score the token at t + 1. Columns after the
            tokenizer's ids are left out. It is not compiled here.
        heldout_rows: how many held-out rows, spread evenly over all of them. None: all.
        batch_rows: rows of a call; the logits of all of them exist at once.
        temperature: T of the two measures `heldout_…_at_temperature`.
        quiet: show no progress.

    Returns a dict for JSON: `heldout_kl`, the headline, and `heldout_kl_by`, its name; the other
    measures as `heldout_…`; and groups of positions. ValueError if the cache holds no targets or no
    held-out rows, or if the logits have another shape.
    """
    cache = open_cache(cache) if isinstance(cache, str | Path) else cache
    check_targets(cache, loss=Loss())
    check_values(Evaluate(heldout_rows=heldout_rows, batch_rows=batch_rows))
    check_values(Loss(temperature=temperature))
    asked = Asked("forward_kl", None, (float(temperature),))
    asked.require_held(held_by([cache]), where=str(cache.path))
    vocabulary, inputs = (
        cache.manifest.vocabulary_size,
        measure_inputs(cache, temperature=temperature),
    )

    def measure(batch: dict[str, np.ndarray]) -> Measures:
        rows = {name: jnp.asarray(batch[name]) for name in TARGETS if name in batch}
        given = jnp.asarray(logits(rows["tokens"], rows["segment_ids"], rows["positions"]))
        if given.shape[:-1] != rows["tokens"].shape or given.shape[-1] < vocabulary:
            raise ValueError(
                f"the model gave logits of shape {given.shape}; expected "
                f"{(*rows['tokens'].shape, vocabulary)}, a logit for each token id at each position"
            )
        return _measures(given[..., :vocabulary], BatchTargets.of(rows), inputs)

    return judge_heldout(
        cache, measure, title="evaluate", rows=heldout_rows, batch_rows=batch_rows, quiet=quiet
    )


@jax.jit
def _measures(
    logits: Float[Array, "batch position vocab"], targets: BatchTargets, inputs: MeasureInputs
) -> Measures:
    """Measures [row, position], a chunk at a time."""
    rows, length, vocabulary = logits.shape
    step = positions_at_once(None, rows=rows, length=length, vocabulary=vocabulary)

    def of_chunk(chunk: tuple[Array, BatchTargets]) -> Measures:
        own, scored = flatten_rows(chunk)
        measures = chunk_measures(own.astype(jnp.float32), scored, inputs)
        return jax.tree.map(lambda x: x.reshape(rows, step), measures)

    measures = jax.lax.map(of_chunk, cut_positions((logits, targets), step))
    return jax.tree.map(lambda x: join_positions(x, length=length), measures)
