"""A model's measures over a cache's held-out rows: all of them, by frequency and by position.

The numbers are means over counted positions of the measures in `judging/measures.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from decant.models.text.text_bytes import bits_per_byte, bytes_of_ids, label_bytes
from decant.progress import notices, track
from decant.schemas import Cache
from decant.schemas.records.rows import next_tokens
from decant.trainer.judging.headline import (
    BOUND,
    COUNTS,
    DENSE,
    FULL,
    PREFIX,
    SKETCH,
    TO_COUNTS,
    estimate_of,
    with_headline,
)
from decant.trainer.judging.heldout import NO_TARGETS, heldout_batches, heldout_rows, spread_rows
from decant.trainer.judging.measures import MeasureInputs, Measures
from decant.trainer.judging.standard_error import standard_error
from decant.trainer.judging.tally import (
    Tally,
    frequency_group,
    frequency_groups,
    position_group,
    position_groups,
)
from decant.trainer.judging.teacher_reference import taught_on_host, teacher_on_labels
from decant.trainer.loss.sketches import sketch_tables

MOST_ROWS = 4096
"""Most rows of which a judgement keeps each row's KL."""
COUNTED_TOKENS = 1 << 22
"""Training tokens that are read to count how frequent each token is."""


def judge_heldout(
    cache: Cache,
    measure: Callable[[dict[str, np.ndarray]], Measures],
    *,
    title: str,
    rows: int | None,
    batch_rows: int,
    quiet: bool,
) -> dict[str, Any]:
    """The measures of a model on `rows` held-out rows (None: all), and what they were made on.

    `measure` gives the measures [row, position] of a batch from `Cache.read`. `title` names the
    work in its progress; `quiet` shows none.

    `heldout_…` are means over all positions with a target, named as in `metrics.jsonl`.
    `heldout_kl` is the headline (`judging/headline.py`), `heldout_kl_by` its name and
    `heldout_kl_error` its standard error with rows as units. `heldout_bits_per_byte` is over all
    positions with a label (`models/text/text_bytes.py`); it is left out if the cache's tokenizer
    does not tell bytes. `by_frequency` and `by_position` give means for groups of positions.
    `kl_by_row` has the headline's sum and the number of tokens of each row, for up to `MOST_ROWS`
    rows. KLs that need a tail prior or draws are left out if the cache has none. ValueError if no
    position has a target.
    """
    numbers = heldout_rows(cache, rows)
    tallies = (
        Tally([{}]),
        Tally(frequency_groups()),
        Tally(position_groups(cache.manifest.sequence_length)),
    )
    shares, estimate = token_shares(cache), estimate_of(cache)
    sums_by_row, tokens_by_row = [], []
    ce, text_bytes, bytes_of = 0.0, 0, bytes_of_ids(cache)
    with track(
        heldout_batches(cache, numbers, batch_rows=batch_rows),
        title,
        total=len(numbers),
        unit="rows",
        console=notices(quiet=quiet),
        each=lambda batch: len(batch["tokens"]),
    ) as batches:
        for batch in batches:
            every = {n: np.asarray(x) for n, x in measure(batch)._asdict().items() if x is not None}
            if estimate is DENSE:
                every[DENSE.measure] = every[BOUND.measure]
            elif estimate is FULL:
                every[FULL.measure] = every[SKETCH.measure]
            elif estimate is TO_COUNTS:
                every[TO_COUNTS.measure] = every.pop(COUNTS.measure)
            every |= teacher_on_labels(batch)
            ce += every["ce"][batch["loss_mask"]].sum(dtype=np.float64)
            text_bytes += label_bytes(batch, bytes_of)
            counted = taught_on_host(batch)
            measures = {name: values[counted] for name, values in every.items()}
            headline = np.where(counted, every[estimate.measure], 0.0)
            sums_by_row += headline.sum(-1, dtype=np.float64).tolist()
            tokens_by_row += counted.sum(-1).tolist()
            labels, at = next_tokens(batch["tokens"])[counted], batch["positions"][counted]
            groups = np.zeros_like(labels), frequency_group(shares[labels]), position_group(at)
            for tally, group in zip(tallies, groups, strict=True):
                tally.add(group, measures)
    whole, by_frequency, by_position = tallies
    if not whole.means():
        raise ValueError(f"{cache.path}: {NO_TARGETS}")
    means = {f"{PREFIX}{name}": value for name, value in whole.means()[0].items()}
    means |= bits_per_byte(float(ce), text_bytes, prefix=PREFIX)
    # Without the rows that fill up the last batch.
    by_row = {"sums": sums_by_row[: len(numbers)], "tokens": tokens_by_row[: len(numbers)]}
    return {
        "cache_id": cache.manifest.cache_id,
        "teacher_id": cache.manifest.logits.teacher_id,
        "rows": len(numbers),
        **with_headline(means, estimate),
        "heldout_kl_error": standard_error(sums_by_row, tokens_by_row),
        "kl_by_row": by_row if len(numbers) <= MOST_ROWS else None,
        "calibration": whole.calibration(),
        "by_frequency": by_frequency.means(),
        "by_position": by_position.means(),
    }


def measure_inputs(
    cache: Cache, *, temperature: float, place: Callable[[np.ndarray], Array] = jnp.asarray
) -> MeasureInputs:
    """The arrays of `cache` that measures need besides a batch; `place` puts them on devices."""
    # Release 0.1 stored no prior.
    prior = cache.tail_prior() if cache.has_tail_prior and cache.manifest.logits.k else None
    sketch = None
    if SKETCH.tail in cache.manifest.signals:
        sketch = jax.tree.map(place, sketch_tables(cache.sketch_heads()))
    # Counts alone know no other T, nor do tails that were aligned without a sketch.
    logits = cache.manifest.logits
    warm = temperature != 1 and logits.k > 0 and not logits.tail_at_1
    return MeasureInputs(
        place(np.asarray(temperature, np.float32)) if warm else None,
        None if prior is None else place(np.asarray(prior, np.float32)),
        sketch,
    )


def token_shares(cache: Cache) -> np.ndarray:
    """Share of each token among the training labels, float64 [vocabulary].

    Labels are counted in train rows spread evenly, as many as hold `COUNTED_TOKENS` tokens.
    """
    counts = np.zeros(cache.manifest.vocabulary_size)
    count = max(1, COUNTED_TOKENS // cache.manifest.sequence_length)
    rows = spread_rows(cache.rows(split="train"), count)
    for start in range(0, len(rows), 256):
        batch = cache.read(rows[start : start + 256], signals=())
        labels = next_tokens(batch["tokens"])[batch["loss_mask"]]
        counts += np.bincount(labels, minlength=len(counts))
    return counts / max(counts.sum(), 1)
