"""A run's student for `inspect --run`: its predictions of rows, beside the teacher's targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np

from decant.models.mesh.sharding import student_mesh
from decant.schemas import Cache
from decant.trainer.judging.predictions import batch_predictions
from decant.trainer.loss.batch_fields import to_device
from decant.trainer.loss.objective import Objective
from decant.trainer.loss.settings import Loss
from decant.trainer.results.judged_on import check_student, is_other_teacher
from decant.trainer.run.saved_initial import open_initial
from decant.trainer.run.trained_student import load_checkpoint

Predict = Callable[[Sequence[int]], dict[str, np.ndarray]]


def open_student(
    run: Path, cache: Cache, *, checkpoint: str, top: int, dtype: str = "float32"
) -> tuple[Predict, str]:
    """A function of row numbers, and a line that says which student it is.

    The function returns the arrays of `judging/predictions.py` by name, [rows, positions, …], with
    the student's `top` likeliest ids. ValueError if the run has another tokenizer than the cache or
    no such checkpoint, FileNotFoundError if there is no run.
    """
    check_student(open_initial(run), cache, run=run)
    mesh = student_mesh(fsdp=jax.device_count())
    graph, params, step = load_checkpoint(run, dtype=dtype, checkpoint=checkpoint)
    objective = Objective(graph, Loss(), vocabulary=cache.manifest.vocabulary_size)
    compiled = jax.jit(partial(batch_predictions, objective, top=top))

    def predict(rows: Sequence[int]) -> dict[str, np.ndarray]:
        # Every device takes as many rows; the repeats are dropped.
        padded = [*rows, *[rows[0]] * (-len(rows) % mesh.size)]
        predictions = compiled(params, to_device(cache.read(padded), mesh=mesh))
        return {
            name: np.asarray(values)[: len(rows)] for name, values in predictions._asdict().items()
        }

    note = f"student of {run} after {step:,} updates"
    if is_other_teacher(cache, run=run):
        note += ", which learned from ANOTHER TEACHER than this cache's"
    return predict, note
