"""The angle between the gradient from a cell's targets and the dense gradient.

Both gradients are for all parameters of the same student, on the same batch at the same T, with
α = 1. The student is the one that learned densely at T = 1: at an untrained one, far from any
target, all angles are alike. The angle of a biased target stays however many tokens are averaged;
that of an unbiased one shrinks. Therefore the angle between the sums over all batches is measured
too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.quality.run import Workshop, kept_student
from benchmarks.quality.study import FIRST_SEED, ROWS, Cell, Study, cells
from benchmarks.quality.uncached import dense_gradient, rs_kd_targets
from decant.models import open_checkpoint
from decant.models.mesh.sharding import teacher_mesh
from decant.schemas import Cache
from decant.schemas.disk.atomic import read_json, write_json
from decant.trainer.config import Loss
from decant.trainer.loss.batch_fields import loss_fields
from decant.trainer.loss.objective import Objective, Tables, scheduled_values
from decant.trainer.run.loss_inputs import sketch_inputs, tail_prior
from decant.trainer.run.student_parameters import graph_and_parameters
from decant.trainer.update.step import mean_gradient

BATCHES = 3
Batch = dict[str, np.ndarray]


def points(shop: Workshop) -> Iterator[Cell]:
    """The cells of the first seed whose targets have a tail to compare with the dense one.

    `fresh` has none of its own: at one visit its counts are like those of `counts`.
    """
    for cell in cells(shop.study):
        has_tail = cell.method != "fresh" and (cell.tail or cell.method in ("record", "dithered"))
        if cell.seed == FIRST_SEED and has_tail:
            yield cell


def measure(shop: Workshop, *, chosen: Callable[[str], bool]) -> Iterator[tuple[str, str | None]]:
    """Measure each chosen cell without a result; yields its name and why it failed, or None."""
    directory = shop.study.results_path / "angles"
    wanted = (c for c in points(shop) if chosen(c.name) and not _path(directory, c).exists())
    gradients: Gradients | None = None
    # In order of temperature, because only one temperature's dense gradients are kept.
    for cell in sorted(wanted, key=lambda c: c.temperature):
        try:
            gradients = gradients or Gradients(shop)
            write_json(_path(directory, cell), gradients.compare(cell))
            yield cell.name, None
        except Exception as error:  # A failure does not stop the other cells.
            yield cell.name, f"{type(error).__name__}: {error}"


def results(directory: Path) -> list[dict[str, Any]]:
    """All results so far."""
    return [read_json(path) for path in sorted((directory / "angles").glob("*.json"))]


def _path(directory: Path, cell: Cell) -> Path:
    return directory / f"{cell.name}.json"


class Gradients:
    """The student's gradients on a few batches of train rows."""

    def __init__(self, shop: Workshop):
        self.shop = shop
        study, cache = shop.study, shop.cache(ROWS)
        self.graph, self.params = graph_and_parameters(_student(shop.study))
        rows = _shuffled(cache)
        count = min(BATCHES, len(rows) // study.batch_rows)
        self.batches = rows[: count * study.batch_rows].reshape(count, study.batch_rows)
        self._dense: tuple[float, list[np.ndarray]] | None = None

    def compare(self, cell: Cell) -> dict[str, Any]:
        """For each batch the angle in degrees, and the error relative to the dense gradient."""
        dense = self.dense(cell.temperature)
        angles, errors = [], []
        total = np.zeros_like(dense[0])
        gradient_of = self.gradient_function(cell)
        for rows, reference in zip(self.batches, dense, strict=True):
            gradient = gradient_of(rows)
            total += gradient
            angles.append(angle(gradient, reference))
            errors.append(_norm(gradient - reference) / _norm(reference))
        return {
            "method": cell.method,
            "temperature": cell.temperature,
            "size": cell.size,
            "bytes_per_token": self.shop.bytes_per_token(cell),
            "angles": angles,
            "relative_errors": errors,
            "angle_of_sum": angle(total, np.sum(dense, axis=0)),
            "batches": len(angles),
            "tokens_per_batch": int(self.batches.shape[1] * self.shop.study.sequence_length),
        }

    def dense(self, temperature: float) -> list[np.ndarray]:
        """The dense gradient of each batch; those of the last temperature are kept."""
        if self._dense is None or self._dense[0] != temperature:
            loss = Loss(alpha=1.0, temperature=temperature, tail="bucket")  # its tail is unused
            compiled = jax.jit(partial(dense_gradient, self.graph, loss=loss))
            teacher, gradients = self.shop.teacher, []
            for rows in self.batches:
                batch = {**self._rows(rows), "teacher_hidden": teacher.hidden(rows)}
                gradient = compiled(self.params, batch, unembedding=teacher.unembedding)[1]
                gradients.append(_vector(gradient))
            self._dense = (temperature, gradients)
        return self._dense[1]

    def gradient_function(self, cell: Cell) -> Callable[[np.ndarray], np.ndarray]:
        """The gradient of the trainer's loss on rows, with the cell's targets."""
        cache, mesh = self.shop.cache(cell.capture), teacher_mesh()
        tail = cell.tail or "sketch"
        loss = Loss(alpha=1.0, temperature=cell.temperature, tail=tail)
        objective = Objective(self.graph, loss, vocabulary=self.shop.teacher.vocabulary)
        compiled = jax.jit(partial(mean_gradient, objective))
        tables = Tables(
            prior=tail_prior(cache, loss=loss, mesh=mesh),
            sketch=sketch_inputs([cache], loss=loss, mesh=mesh),
        )

        def gradient(rows: np.ndarray) -> np.ndarray:
            batch = cache.read(rows)
            if cell.method == "rs-kd":
                batch |= rs_kd_targets(self.shop.teacher, rows, draws=cell.draws)
            _, _, gradient = compiled(
                self.params,
                {name: jnp.asarray(batch[name]) for name in loss_fields(tail)},
                values=scheduled_values(loss, 0, steps=1),
                tables=tables,
            )
            return _vector(gradient)

        return gradient

    def _rows(self, rows: np.ndarray) -> Batch:
        return self.shop.cache(ROWS).read(rows, signals=())


def _shuffled(cache: Cache) -> np.ndarray:
    """Train rows, shuffled."""
    return np.random.default_rng(0).permutation(cache.rows(split="train"))


def angle(one: np.ndarray, other: np.ndarray) -> float:
    """Angle between two gradients in degrees."""
    cosine = one.astype(np.float64) @ other / (_norm(one) * _norm(other))
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))  # float32 has no angle below 0.03 degrees


def _vector(gradient: Any) -> np.ndarray:
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(gradient)])


def _student(study: Study) -> nnx.Module:
    path = kept_student(study)
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there yet; run the cell dense-T1 first")
    return open_checkpoint(path).load(dtype=study.student_dtype, param_dtype="float32")
