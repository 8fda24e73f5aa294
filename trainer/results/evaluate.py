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
from rich.box import SIMPLE_HEAD
from rich.table import Table

from decant.models.mesh.sharding import replicate, student_mesh
from decant.progress import notices, track
from decant.schemas import Cache
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.records.rows import next_tokens
from decant.trainer.config import Evaluate, Loss
from decant.trainer.judging.heldout import NO_TARGETS, heldout_batches, heldout_rows, spread_rows
from decant.trainer.judging.measures import MeasureInputs, batch_measures
from decant.trainer.judging.tally import (
    Tally,
    frequency_group,
    frequency_groups,
    position_group,
    position_groups,
)
from decant.trainer.loss.batch_fields import to_device
from decant.trainer.loss.objective import Objective
from decant.trainer.results.judged_on import (
    cache_to_judge_on,
    check_student,
    describe,
    is_other_teacher,
)
from decant.trainer.run.binding import read_run_settings
from decant.trainer.run.initial_student import open_initial
from decant.trainer.run.trained_student import load_checkpoint, weights_sha256

FILE = "evaluation.json"
COUNTED_TOKENS = 1 << 22
"""Training tokens that are read to count how frequent each token is."""


def evaluate(config: Evaluate) -> dict[str, Any]:
    """Evaluate a run's checkpoint; also writes the result to `evaluation.json` in the run.

    `heldout_…` are means over all positions, named as in `metrics.jsonl`; `by_frequency` and
    `by_position` give means for groups of positions. KLs that need a tail prior or draws are left
    out if the cache has none. Raises ValueError if the cache has another tokenizer or an unnamed
    other teacher, no targets or no held-out rows, or the run no such checkpoint; FileNotFoundError
    if there is no run.
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
    shares = token_shares(cache)
    tail = "sampled" if cache.manifest.logits.draws else "bucket"
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
        at_positions = compiled(params, to_device(batch, mesh=mesh, tail=tail), inputs)
        counted = batch["loss_mask"]
        measures = {
            name: np.asarray(values)[counted]
            for name, values in at_positions._asdict().items()
            if values is not None
        }
        labels, positions = next_tokens(batch["tokens"])[counted], batch["positions"][counted]
        groups = np.zeros_like(labels), frequency_group(shares[labels]), position_group(positions)
        for tally, group in zip(tallies, groups, strict=True):
            tally.add(group, measures)
    whole, by_frequency, by_position = tallies
    if not whole.means():
        raise ValueError(f"{cache.path}: {NO_TARGETS}")
    evaluation = {
        "step": step,
        "weights": weights_sha256(params),
        "cache_id": cache.manifest.cache_id,
        "teacher_id": cache.manifest.logits.teacher_id,
        "other_teacher": is_other_teacher(cache, run=config.run),
        "rows": len(numbers),
        "dtype": config.dtype,
        "temperature": temperature,
        **{f"heldout_{name}": value for name, value in whole.means()[0].items()},
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


COLUMNS = {
    "kl_bound": ("KL ≥", "{:.4f}"),
    "kl_estimate": ("KL ≈", "{:.4f}"),
    "kl_unbiased": ("KL, draws", "{:.4f}"),
    "kl_bound_at_temperature": ("at T ≥", "{:.4f}"),
    "kl_estimate_at_temperature": ("at T ≈", "{:.4f}"),
    "ce": ("CE", "{:.4f}"),
    "perplexity": ("perplexity", "{:,.1f}"),
    "agreement": ("top-1", "{:.1%}"),
    "top5_agreement": ("top-5", "{:.1%}"),
    "accuracy": ("right", "{:.1%}"),
    "ece": ("ECE", "{:.3f}"),
}
"""Columns of the table: measure, title and format."""


def as_table(evaluation: dict[str, Any]) -> Table:
    """An evaluation as a table for the terminal."""
    prefix = "heldout_"
    whole = {k.removeprefix(prefix): v for k, v in evaluation.items() if k.startswith(prefix)}
    shown = [name for name in COLUMNS if name in whole]
    if evaluation["temperature"] == 1:
        shown = [name for name in shown if not name.endswith("at_temperature")]
    title = f"{describe(evaluation)}, T = {evaluation['temperature']:g}"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("positions", no_wrap=True)
    for name in ("tokens", *(COLUMNS[name][0] for name in shown), "acceptance"):
        table.add_column(name, justify="right")

    def add(label: str, means: dict[str, Any], **style: Any) -> None:
        cells = [COLUMNS[name][1].format(means[name]) for name in shown]
        low, high = means["acceptance"]
        acceptance = f"{low:.1%} – {high:.1%}"
        table.add_row(label, f"{means['tokens']:,}", *cells, acceptance, **style)

    add("all", whole, end_section=True)
    for means in evaluation["by_frequency"]:
        last = means is evaluation["by_frequency"][-1]
        add(f"next token {means['frequency']}", means, end_section=last)
    for means in evaluation["by_position"]:
        add(f"at {position_range(means)}", means)
    return table


def position_range(means: dict[str, Any]) -> str:
    """A group's positions as text: `0`, `4–7`."""
    start, end = means["position_from"], means["position_to"]
    return str(start) if start == end else f"{start}–{end}"


def _measure_inputs(cache: Cache, *, temperature: float, mesh: Mesh) -> MeasureInputs:
    # Release 0.1 stored none.
    prior = cache.tail_prior() if cache.has_tail_prior else None
    return MeasureInputs(
        None if temperature == 1 else replicate(np.asarray(temperature, np.float32), mesh),
        None if prior is None else replicate(np.asarray(prior, np.float32), mesh),
    )
