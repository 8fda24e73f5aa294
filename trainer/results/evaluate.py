"""The command `evaluate`: measure a run's student on a cache's held-out rows.

`judging/whole.py` takes the measures; this file finds the student and what to judge it on.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from decant.models.mesh.sharding import replicate, student_mesh
from decant.schemas.disk.atomic import read_json, write_json
from decant.trainer.config import Evaluate, Loss
from decant.trainer.judging.measures import Measures, batch_measures
from decant.trainer.judging.whole import judge_heldout, measure_inputs
from decant.trainer.loss.batch_fields import to_device
from decant.trainer.loss.objective import Objective
from decant.trainer.results.judged_on import cache_to_judge_on, check_student, is_other_teacher
from decant.trainer.run.binding import read_run_settings
from decant.trainer.run.saved_initial import open_initial
from decant.trainer.run.trained_student import load_checkpoint, weights_sha256

FILE = "evaluation.json"


def evaluate(config: Evaluate) -> dict[str, Any]:
    """Evaluate a run's checkpoint; also writes the result to `evaluation.json` in the run.

    `judge_heldout` says what it holds. Raises ValueError if the cache has another tokenizer or an
    unnamed other teacher, no targets or no held-out rows, or the run no such checkpoint;
    FileNotFoundError if there is no run.
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
    inputs = measure_inputs(cache, temperature=temperature, place=partial(replicate, mesh=mesh))

    def measure(batch: dict[str, np.ndarray]) -> Measures:
        return compiled(params, to_device(batch, mesh=mesh, everything=True), inputs)

    judged = judge_heldout(
        cache,
        measure,
        title=f"evaluate {config.run.name}",
        rows=config.heldout_rows,
        batch_rows=config.batch_rows + -config.batch_rows % mesh.size,
        quiet=config.quiet,
    )
    evaluation = {
        "step": step,
        "weights": weights_sha256(params),
        "other_teacher": is_other_teacher(cache, run=config.run),
        "dtype": config.dtype,
        "temperature": temperature,
        **judged,
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
