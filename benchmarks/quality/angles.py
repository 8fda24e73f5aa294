"""The angle between the gradient from a method's targets and the dense gradient.

Both gradients are for all parameters of the same student, on the same batch at the same T, with
α = 1. The angle of a biased target stays however many tokens are averaged; that of an unbiased one
shrinks. Therefore the angle between the sums over all batches is measured too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality.bytes import BYTES_PER_ID
from benchmarks.quality.run import Workshop, kept_student
from benchmarks.quality.study import CAPTURES, DRAWS, ROWS
from benchmarks.quality.uncached import dense_gradient, rs_kd_targets
from decant.models import open_checkpoint
from decant.models.checkpoints.cut import cut_layers, evenly_spaced
from decant.models.mesh.sharding import teacher_mesh
from decant.models.mesh.vocabulary import Vocabulary
from decant.pipelines.config import Logits
from decant.pipelines.teacher.sharded_head import Head
from decant.pipelines.teacher.targets import LogitsSpec, TokenInputs
from decant.pipelines.teacher.targets import targets as exact_targets
from decant.schemas import Cache, codecs
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.records.logits import decode_logits, encode_logits, open_logits
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.draws import Draws, logweights, uniform_starts
from decant.schemas.targets.targets import Targets, join_targets
from decant.trainer.config import Loss
from decant.trainer.loss.batch_fields import DRAWS as DRAWS_FIELDS
from decant.trainer.loss.batch_fields import loss_fields
from decant.trainer.loss.objective import Objective, Tables, scheduled_values
from decant.trainer.run.loss_inputs import tail_prior
from decant.trainer.run.student_parameters import graph_and_parameters
from decant.trainer.update.step import mean_gradient

BATCHES = 3
CALIBRATION_ROWS = 16
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Point:
    """A method and its settings: the origin of its targets and the loss that uses them."""

    method: str
    temperature: float
    settings: str
    """`k=32`, `k=16 m=10` or `N=50`: tells points of one method apart."""
    tail: str
    capture: dict[str, Any] | int
    """`signals.logits` of a precompute config, or RS-KD's number of draws."""

    @property
    def name(self) -> str:
        """Name of the point's files: `sampled-T1-k16-m10`."""
        settings = self.settings.replace("=", "").replace(" ", "-").replace("/", "")
        return f"{self.method}-T{self.temperature:g}-{settings}"


def points() -> Iterator[Point]:
    """All points: the targets of the study's cells at T = 1, 2, 4, and other sizes at T = 1."""
    for k, temperatures in ((8, (1.0,)), (16, (1.0,)), (32, (1.0, 2.0, 4.0)), (64, (1.0,))):
        for temperature in temperatures:
            for method in ("bucket", "renormalize", "prior"):
                capture = {"k": k, "profile": "compact"}
                yield Point(method, temperature, f"k={k}", method, capture)
    for k, m in ((8, 16), (16, 4), (16, DRAWS), (16, 32), (32, 16)):
        capture = {**CAPTURES["top16-draws"], "k": k, "draws": m}
        yield Point("sampled", 1.0, f"k={k} m={m}", "sampled", capture)
    capture = CAPTURES["top16-draws-T2"]
    yield Point("sampled", 2.0, f"k={capture['k']} m={DRAWS}", "sampled", capture)
    for n in (25, 50, 100, 200):
        yield Point("rs-kd", 1.0, f"N={n}", "renormalize", n)


def measure(shop: Workshop, *, chosen: Callable[[str], bool]) -> Iterator[tuple[str, str | None]]:
    """Measure each chosen point without a result; yields its name and why it failed, or None."""
    directory = shop.study.work / "angles"
    for student in ("initial", "trained"):
        wanted = (p for p in points() if not _path(directory, p, student).exists())
        # In order of temperature, because only one temperature's dense gradients are kept.
        todo = sorted((p for p in wanted if chosen(p.name)), key=lambda p: p.temperature)
        if not todo:
            continue
        gradients: Gradients | None = None
        for point in todo:
            try:
                gradients = gradients or Gradients(shop, student)
                result = gradients.compare(point)
                write_json(_path(directory, point, student), {"student": student, **result})
                yield f"{point.name} ({student})", None
            except Exception as error:  # A failure does not stop the other points.
                yield f"{point.name} ({student})", f"{type(error).__name__}: {error}"


def results(work: Path) -> list[dict[str, Any]]:
    """All results so far."""
    return [read_json(path) for path in sorted((work / "angles").glob("*.json"))]


def _path(directory: Path, point: Point, student: str) -> Path:
    return directory / f"{point.name}-{student}.json"


class Gradients:
    """One student's gradients on a few batches of train rows."""

    def __init__(self, shop: Workshop, student: str):
        self.shop = shop
        study, cache = shop.study, shop.cache(ROWS)
        self.graph, self.params = graph_and_parameters(_student(shop, student))
        rows = _shuffled(cache)
        count = min(BATCHES, len(rows) // study.batch_rows)
        self.batches = rows[: count * study.batch_rows].reshape(count, study.batch_rows)
        self._dense: tuple[float, list[np.ndarray]] | None = None
        self._compiled: dict[Loss, Callable] = {}

    def compare(self, point: Point) -> dict[str, Any]:
        """For each batch the angle in degrees, and the error relative to the dense gradient."""
        dense = self.dense(point.temperature)
        angles, errors, sizes = [], [], []
        total = np.zeros_like(dense[0])
        for rows, reference in zip(self.batches, dense, strict=True):
            targets, size = targets_of(point, self.shop, rows)
            gradient = self.gradient(rows, targets, point)
            total += gradient
            angles.append(angle(gradient, reference))
            errors.append(_norm(gradient - reference) / _norm(reference))
            sizes.append(size)
        return {
            "method": point.method,
            "temperature": point.temperature,
            "settings": point.settings,
            "measured": isinstance(point.capture, dict),
            "bytes_per_token": float(np.mean(sizes)),
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

    def gradient(self, rows: np.ndarray, targets: Batch, point: Point) -> np.ndarray:
        """The gradient of the trainer's loss with the point's targets."""
        loss = Loss(alpha=1.0, temperature=point.temperature, tail=point.tail)
        if loss not in self._compiled:
            self._compiled[loss] = jax.jit(
                partial(
                    mean_gradient,
                    Objective(self.graph, loss, vocabulary=self.shop.teacher.vocabulary),
                )
            )
        prior = tail_prior(self.shop.cache(ROWS), loss=loss, mesh=teacher_mesh())
        batch = {**self._rows(rows), **targets}
        _, _, gradient = self._compiled[loss](
            self.params,
            {name: jnp.asarray(batch[name]) for name in loss_fields(loss.tail)},
            values=scheduled_values(loss, 0, steps=1),
            tables=Tables(prior=prior),
        )
        return _vector(gradient)

    def _rows(self, rows: np.ndarray) -> Batch:
        return self.shop.cache(ROWS).read(rows, signals=())


def targets_of(point: Point, shop: Workshop, rows: np.ndarray) -> tuple[Batch, float]:
    """The point's targets for these rows, and their bytes a scored position."""
    if isinstance(point.capture, dict):
        return captured(Logits(**point.capture), shop, rows)
    batch = rs_kd_targets(shop.teacher, rows, draws=point.capture)
    stored = np.isfinite(batch["topk_logprobs"]).sum(-1)
    return batch, BYTES_PER_ID * float(stored.mean())


def captured(logits: Logits, shop: Workshop, rows: np.ndarray) -> tuple[Batch, float]:
    """Targets as a capture with these settings stores them and a cache reads them, and their bytes.

    Codec tables are fitted on other rows. Arrays are padded, so that each loss compiles once.
    """
    spec, vocabulary = logits.target_spec(), shop.teacher.vocabulary
    shared = {"tables": _tables(logits, shop), "vocabulary": vocabulary}
    batch, size, positions = _empty(len(rows), spec, shop.study.sequence_length), 0, 0
    for i, row in enumerate(rows):
        exact, scored, key = _exact_targets_of_row(shop, int(row), spec)
        record = encode_logits(exact, row_key=key, scored=scored, profile=logits.profile, **shared)
        got = decode_logits(
            [open_logits(record, where="benchmark", length=len(scored), spec=spec)], **shared
        )
        batch["topk_ids"][i, scored, : got.k] = got.ids
        batch["topk_logprobs"][i, scored, : got.k] = got.logprobs
        batch["tail_logmass"][i, scored] = got.tail_logmass
        if got.draws:
            weights = logweights(got.draws, got.tail_logmass, nodes=spec.betas)
            values = (got.draws.ids, got.draws.logprobs, weights)
            for name, x in zip(DRAWS_FIELDS, values, strict=True):
                batch[name][i, scored, : got.draws.m] = x
        size, positions = size + len(record), positions + int(scored.sum())
    return batch, size / positions


@lru_cache
def _tables(logits: Logits, shop: Workshop) -> codecs.Tables:
    others = _shuffled(shop.cache(ROWS))[-CALIBRATION_ROWS:]
    sample = join_targets(
        [_exact_targets_of_row(shop, int(row), logits.target_spec())[0] for row in others]
    )
    return codecs.fit(logits.profile, sample, vocabulary=shop.teacher.vocabulary)


def _shuffled(cache: Cache) -> np.ndarray:
    """Train rows, shuffled: batches are taken from the front, calibration rows from the back."""
    return np.random.default_rng(0).permutation(cache.rows(split="train"))


@lru_cache(maxsize=64)
def _exact_targets_of_row(
    shop: Workshop, row: int, spec: TargetSpec
) -> tuple[Targets, np.ndarray, bytes]:
    """The exact targets of a row's scored positions, the mask of these positions, the row's key."""
    teacher = shop.teacher
    read = shop.cache(ROWS).read([row], signals=())
    # The key seeds the draws. Any key that depends on the row alone will do.
    key, scored = hashlib.sha256(read["tokens"].tobytes()).digest()[:16], read["loss_mask"][0]
    at = jnp.asarray(uniform_starts(key, positions=len(scored)))
    hidden = teacher.hidden(np.array([row]))[0]
    head = Head(Vocabulary(teacher.unembedding.shape[1]))
    asked = LogitsSpec(spec)
    arrays = _targets(hidden, teacher.unembedding, TokenInputs(at), spec=asked, head=head)
    of_row = {name: np.asarray(x)[scored] for name, x in arrays.items()}
    draws = None
    if spec.draws:
        draws = Draws(of_row["tail_ids"], of_row["tail_logprobs"], spec.draw_betas)
    names = ("ids", "logprobs", "tail_logmass")
    return Targets(*(of_row[name] for name in names), draws=draws), scored, key


_targets = jax.jit(exact_targets, static_argnames=("spec", "head"))


def _empty(rows: int, spec: TargetSpec, length: int) -> Batch:
    k, m = 64, 32
    shapes = {"topk_ids": k, "topk_logprobs": k, "tail_logmass": len(spec.betas)}
    if spec.draws:
        shapes |= dict.fromkeys(DRAWS_FIELDS, m)
    return {
        name: np.zeros((rows, length, last), np.int32)
        if name.endswith("ids")
        else np.full((rows, length, last), -np.inf, np.float32)
        for name, last in shapes.items()
    }


def angle(one: np.ndarray, other: np.ndarray) -> float:
    """Angle between two gradients in degrees."""
    cosine = one.astype(np.float64) @ other / (_norm(one) * _norm(other))
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x))


def _vector(gradient: Any) -> np.ndarray:
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(gradient)])


def _student(shop: Workshop, which: str) -> Any:
    study = shop.study
    if which == "trained":
        path = kept_student(study)
        if not path.exists():
            raise FileNotFoundError(f"{path}: not there yet; run the cell dense-T1 first")
        return open_checkpoint(path).load(dtype=study.student_dtype, param_dtype="float32")
    source = open_checkpoint(study.teacher)
    return cut_layers(
        source, evenly_spaced(study.layers, source.config.num_layers), dtype=study.student_dtype
    )
