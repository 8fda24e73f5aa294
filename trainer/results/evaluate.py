"""The command `evaluate`: measure a run's student on a cache's held-out rows.

The numbers are means over counted positions of the measures in `judging/measures.py`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from decant.models.mesh.sharding import replicate, student_mesh
from decant.progress import notices, track
from decant.schemas import Cache
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.records.rows import next_tokens
from decant.trainer.config import Evaluate, Loss
from decant.trainer.judging.headline import (
    BOUND,
    DENSE,
    PREFIX,
    estimate_of,
    with_headline,
)
from decant.trainer.judging.heldout import NO_TARGETS, heldout_batches, heldout_rows, spread_rows
from decant.trainer.judging.measures import MeasureInputs, batch_measures
from decant.trainer.judging.standard_error import standard_error
from decant.trainer.judging.tally import (
    Tally,
    frequency_group,
    frequency_groups,
    position_group,
    position_groups,
)
from decant.trainer.judging.teacher_reference import teacher_on_labels
from decant.trainer.loss.batch_fields import to_device
from decant.trainer.loss.objective import Objective
from decant.trainer.results.judged_on import cache_to_judge_on, check_student, is_other_teacher
from decant.trainer.run.binding import read_run_settings
from decant.trainer.run.initial_student import open_initial
from decant.trainer.run.trained_student import load_checkpoint, weights_sha256

FILE = "evaluation.json"
MOST_ROWS = 4096
"""Most rows of which an evaluation keeps each row's KL."""
COUNTED_TOKENS = 1 << 22
"""Training tokens that are read to count how frequent each token is."""


def evaluate(config: Evaluate) -> dict[str, Any]:
    """Evaluate a run's checkpoint; also writes the result to `evaluation.json` in the run.

    `heldout_…` are means over all positions, named as in `metrics.jsonl`; `heldout_kl` is the
    headline (`judging/headline.py`), `heldout_kl_by` its name and `heldout_kl_error` its standard
    error with rows as units. `by_frequency` and `by_position` give means for groups of positions.
    `kl_by_row` has the headline's sum and the number of tokens of each row, for up to `MOST_ROWS`
    rows. KLs that need a tail prior or draws are left out if the cache has none. Raises ValueError
    if the cache has another tokenizer or an unnamed other teacher, no targets or no held-out rows,
    or the run no such checkpoint; FileNotFoundError if there is no run.
    """
    student = open_initial(config.run)
    cache = cache_to_judge_on(config)
    check_student(student, cache, run=config.run)
    mesh = student_mesh(fsdp=jax.device_count())
    graph, params, step = load_checkpoint(
        config.run, dtype=config.dtype, checkpoint=config.checkpoint
    )
    temperature = training_temperature(config.run)
    compiled = jax.jit(
        partial(
            batch_measures,
            Objective(graph, Loss(), vocabulary=cache.manifest.vocabulary_size),
        )
    )
    inputs = _measure_inputs(cache, temperature=temperature, mesh=mesh)
    numbers = heldout_rows(cache, config.heldout_rows)
    tallies = (
        Tally([{}]),
        Tally(frequency_groups()),
        Tally(position_groups(cache.manifest.sequence_length)),
    )
    shares, estimate = token_shares(cache), estimate_of(cache)
    sums_by_row, tokens_by_row = [], []
    batch_rows = config.batch_rows + -config.batch_rows % mesh.size
    batches = track(
        heldout_batches(cache, numbers, batch_rows=batch_rows),
        f"evaluate {config.run.name}",
        total=len(numbers),
        unit="rows",
        console=notices(quiet=config.quiet),
        each=lambda batch: len(batch["tokens"]),
    )
    for batch in batches:
        at_positions = compiled(params, to_device(batch, mesh=mesh, tail=estimate.tail), inputs)
        every = {n: np.asarray(x) for n, x in at_positions._asdict().items() if x is not None}
        if estimate is DENSE:
            every[DENSE.measure] = every[BOUND.measure]
        every |= teacher_on_labels(batch)
        counted = batch["loss_mask"]
        measures = {name: values[counted] for name, values in every.items()}
        headline = np.where(counted, every[estimate.measure], 0.0)
        sums_by_row += headline.sum(-1, dtype=np.float64).tolist()
        tokens_by_row += counted.sum(-1).tolist()
        labels, positions = next_tokens(batch["tokens"])[counted], batch["positions"][counted]
        groups = np.zeros_like(labels), frequency_group(shares[labels]), position_group(positions)
        for tally, group in zip(tallies, groups, strict=True):
            tally.add(group, measures)
    whole, by_frequency, by_position = tallies
    if not whole.means():
        raise ValueError(f"{cache.path}: {NO_TARGETS}")
    means = {f"{PREFIX}{name}": value for name, value in whole.means()[0].items()}
    error = standard_error(sums_by_row, tokens_by_row)
    # Without the rows that fill up the last batch.
    by_row = {"sums": sums_by_row[: len(numbers)], "tokens": tokens_by_row[: len(numbers)]}
    evaluation = {
        "step": step,
        "weights": weights_sha256(params),
        "cache_id": cache.manifest.cache_id,
        "teacher_id": cache.manifest.logits.teacher_id,
        "other_teacher": is_other_teacher(cache, run=config.run),
        "rows": len(numbers),
        "dtype": config.dtype,
        "temperature": temperature,
        **with_headline(means, estimate),
        "heldout_kl_error": error,
        "kl_by_row": by_row if len(numbers) <= MOST_ROWS else None,
        "calibration": whole.calibration(),
        "by_frequency": by_frequency.means(),
        "by_position": by_position.means(),
    }
    write_json(config.run / FILE, evaluation)
    return evaluation


def read_evaluation(run: Path) -> dict[str, Any] | None:
    """The run's last evaluation; None if `evaluate` was never run on it."""
    return read_json(run / FILE, holds="by_frequency") if (run / FILE).exists() else None


def training_temperature(run: Path) -> float:
    """The loss's temperature at the end of a run."""
    settings = read_run_settings(run)
    end = settings.get("loss.temperature_end")
    return float(settings["loss.temperature"] if end is None else end)


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


def _measure_inputs(cache: Cache, *, temperature: float, mesh: Mesh) -> MeasureInputs:
    # Release 0.1 stored none.
    prior = cache.tail_prior() if cache.has_tail_prior else None
    return MeasureInputs(
        None if temperature == 1 else replicate(np.asarray(temperature, np.float32), mesh),
        None if prior is None else replicate(np.asarray(prior, np.float32), mesh),
    )
