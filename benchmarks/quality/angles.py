"""The angle between a method's gradient and the dense one, without training anything.

The same student, the same batch, the same T, α = 1; gradients of all the student's parameters. A
biased target keeps its angle however many tokens are averaged, an unbiased one loses it: hence
also the angle between the sums over all batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.codecs import shortened
from benchmarks.quality.bytes import BYTES_PER_ID, record_bytes
from benchmarks.quality.run import Workshop, kept_student
from benchmarks.quality.study import DRAWS, ROWS
from benchmarks.quality.teacher import DenseTeacher, logprobs
from benchmarks.quality.uncached import NODES, dense_gradient, rs_kd_targets
from models import open_checkpoint
from models.students import cut_layers, spread
from pipelines.targets import targets as exact_targets
from schemas import Cache, codecs
from schemas.files import read_json, write_json
from schemas.logits import decode_logits, encode_logits
from schemas.targets import Targets
from trainer.config import Loss
from trainer.step import mean_gradient
from trainer.student import parameters

BATCHES = 3
CALIBRATION_ROWS = 16
Batch = dict[str, np.ndarray]
ROW_FIELDS = ("tokens", "segment_ids", "positions", "loss_mask")
TOPK_FIELDS = ("topk_ids", "topk_logprobs", "tail_logmass")


@dataclass(frozen=True)
class Point:
    """A method with its settings: where its targets come from and which loss takes them."""

    method: str
    temperature: float
    settings: str
    """`k=32`, `k=16 m=10`, `N=50`: what distinguishes points of one method."""
    tail: str
    source: Callable[[Workshop, np.ndarray], tuple[Batch, float]]
    """Targets of these rows, and bytes a token."""
    measured: bool
    """Whether the bytes are those of records, or estimated from ids."""

    @property
    def name(self) -> str:
        """`sampled-T1-k16-m10`: what its files are called."""
        settings = self.settings.replace("=", "").replace(" ", "-").replace("/", "")
        return f"{self.method}-T{self.temperature:g}-{settings}"


def points() -> Iterator[Point]:
    """What is compared: the caches that the cells train from, then other sizes at T = 1."""
    for temperature in (1.0, 2.0, 4.0):
        for method in ("bucket", "renormalize", "prior"):
            yield Point(method, temperature, "k=32", method, partial(from_cache, ROWS), True)
    draws = f"k=16 m={DRAWS}"
    yield Point("sampled", 1.0, draws, "sampled", partial(from_cache, "top16-draws"), True)
    yield Point("sampled", 2.0, draws, "sampled", partial(from_cache, "top16-draws-T2"), True)
    yield Point("threshold", 1.0, "c=1/100", "sampled", partial(from_cache, "threshold"), True)
    for k in (8, 16, 64):
        for method in ("bucket", "renormalize"):
            yield Point(method, 1.0, f"k={k}", method, partial(from_codec, k), True)
    for k, m in ((16, 4), (16, 32), (32, 16)):
        settings = f"k={k} m={m}"
        yield Point("sampled", 1.0, settings, "sampled", partial(with_draws, k, m), False)
    for n in (25, 50, 100, 200):
        yield Point("rs-kd", 1.0, f"N={n}", "renormalize", partial(rs_kd, n), False)


def measure(shop: Workshop, *, chosen: Callable[[str], bool]) -> Iterator[tuple[str, str | None]]:
    """Measure what is not measured yet; the name of each point and why it failed, if it did."""
    directory = shop.study.work / "angles"
    for student in ("initial", "trained"):
        wanted = (p for p in points() if not _path(directory, p, student).exists())
        # By temperature: the dense gradients of one are kept until the next.
        todo = sorted((p for p in wanted if chosen(p.name)), key=lambda p: p.temperature)
        if not todo:
            continue
        gradients = Gradients(shop, student)
        for point in todo:
            try:
                result = gradients.compare(point)
                write_json(_path(directory, point, student), {"student": student, **result})
                yield f"{point.name} ({student})", None
            except Exception as error:  # one point's failure is not the others'
                yield f"{point.name} ({student})", f"{type(error).__name__}: {error}"


def results(work: Path) -> list[dict[str, Any]]:
    """Everything measured so far."""
    return [read_json(path) for path in sorted((work / "angles").glob("*.json"))]


def _path(directory: Path, point: Point, student: str) -> Path:
    return directory / f"{point.name}-{student}.json"


class Gradients:
    """One student's gradients on a few batches of train rows; the dense ones are kept."""

    def __init__(self, shop: Workshop, student: str):
        self.shop = shop
        study, cache = shop.study, shop.cache(ROWS)
        self.graph, self.params = parameters(_student(shop, student))
        rows = _shuffled(cache)
        count = min(BATCHES, len(rows) // study.batch_rows)
        self.batches = rows[: count * study.batch_rows].reshape(count, study.batch_rows)
        self._dense: tuple[float, list[np.ndarray]] | None = None
        self._compiled: dict[Loss, Callable] = {}

    def compare(self, point: Point) -> dict[str, Any]:
        """Angles in degrees and errors relative to the dense gradient's norm, over the batches."""
        dense = self.dense(point.temperature)
        angles, errors, sizes = [], [], []
        total = np.zeros_like(dense[0])
        for rows, reference in zip(self.batches, dense, strict=True):
            targets, size = point.source(self.shop, rows)
            gradient = self.gradient(rows, targets, point)
            total += gradient
            angles.append(angle(gradient, reference))
            errors.append(_norm(gradient - reference) / _norm(reference))
            sizes.append(size)
        return {
            "method": point.method,
            "temperature": point.temperature,
            "settings": point.settings,
            "measured": point.measured,
            "bytes_per_token": float(np.mean(sizes)),
            "angles": angles,
            "relative_errors": errors,
            "angle_of_sum": angle(total, np.sum(dense, axis=0)),
            "batches": len(angles),
            "tokens_per_batch": int(self.batches.shape[1] * self.shop.study.sequence_length),
        }

    def dense(self, temperature: float) -> list[np.ndarray]:
        """The dense gradient of each batch. Those of one temperature are kept: points come so."""
        if self._dense is None or self._dense[0] != temperature:
            loss = Loss(alpha=1.0, temperature=temperature)
            compiled = jax.jit(partial(dense_gradient, self.graph, loss=loss))
            teacher, found = self.shop.teacher, []
            for rows in self.batches:
                batch = {**self._rows(rows), "teacher_hidden": teacher.hidden(rows)}
                gradient = compiled(self.params, batch, unembedding=teacher.unembedding)[1]
                found.append(_vector(gradient))
            self._dense = (temperature, found)
        return self._dense[1]

    def gradient(self, rows: np.ndarray, targets: Batch, point: Point) -> np.ndarray:
        """The method's gradient by the trainer's own loss."""
        loss = Loss(alpha=1.0, temperature=point.temperature, tail=point.tail)  # type: ignore[arg-type]
        if loss not in self._compiled:
            self._compiled[loss] = jax.jit(
                partial(
                    mean_gradient,
                    self.graph,
                    loss=loss,
                    vocabulary=self.shop.teacher.vocabulary,
                    microbatches=1,
                )
            )
        batch = {**self._rows(rows), **targets}
        return _vector(self._compiled[loss](self.params, batch)[2])

    def _rows(self, rows: np.ndarray) -> Batch:
        read = self.shop.cache(ROWS).read(rows, signals=())
        return {name: read[name] for name in ROW_FIELDS}


def from_cache(capture: str, shop: Workshop, rows: np.ndarray) -> tuple[Batch, float]:
    """As the cells train: a real cache's targets."""
    cache = shop.cache(capture)
    read = cache.read(rows)
    fields = {name: x for name, x in read.items() if name not in ROW_FIELDS}
    return fields, record_bytes(cache)


def from_codec(k: int, shop: Workshop, rows: np.ndarray) -> tuple[Batch, float]:
    """Exact top-k of the dense teacher through `compact`, its tables from other rows."""
    teacher, cache = shop.teacher, shop.cache(ROWS)
    shared = {"tables": _tables(k, shop), "vocabulary": teacher.vocabulary}
    batch, size, positions = _empty(len(rows), cache.manifest.sequence_length, k), 0, 0
    for i, row in enumerate(rows):
        found, scored = _shortened(_exact(teacher, cache, row), k, teacher)
        record = encode_logits(found, row_key=bytes(16), scored=scored, profile="compact", **shared)
        decoded = decode_logits(record, where="benchmark", **shared)[1]
        values = (decoded.ids, decoded.logprobs, decoded.tail_logmass)
        for name, x in zip(TOPK_FIELDS, values, strict=True):
            batch[name][i, scored] = x
        size, positions = size + len(record), positions + int(scored.sum())
    return batch, size / positions


@lru_cache
def _tables(k: int, shop: Workshop) -> codecs.Tables:
    teacher, cache = shop.teacher, shop.cache(ROWS)
    others = _shuffled(cache)[-CALIBRATION_ROWS:]
    sample = _joined([_shortened(_exact(teacher, cache, row), k, teacher) for row in others])
    return codecs.fit("compact", sample, vocabulary=teacher.vocabulary)


def _shuffled(cache: Cache) -> np.ndarray:
    """Train rows: batches come from the front, calibration from the back."""
    return np.random.default_rng(0).permutation(cache.rows(split="train"))


def with_draws(k: int, m: int, shop: Workshop, rows: np.ndarray) -> tuple[Batch, float]:
    """The same with m systematic draws a position from the tail at T = 1."""
    batch, size = from_codec(k, shop, rows)
    dense = np.asarray(logprobs(shop.teacher, rows))
    batch |= systematic_draws(dense, batch["topk_ids"], m=m, seed=int(rows[0]))
    # What a draw takes as stored: the cells' cache against its top-k alone.
    per_draw = (record_bytes(shop.cache("top16-draws")) - from_codec(16, shop, rows)[1]) / DRAWS
    return batch, size + m * per_draw


def systematic_draws(dense: np.ndarray, topk_ids: np.ndarray, *, m: int, seed: int) -> Batch:
    """m draws a position, each tail token v as often as m·p(v)/t says, one offset a position."""
    tail = np.exp(dense.astype(np.float64))
    np.put_along_axis(tail, topk_ids.astype(np.int64), 0.0, axis=-1)
    cdf = np.cumsum(tail, axis=-1)
    mass = cdf[..., -1:]
    offsets = np.random.default_rng(seed).random(mass.shape)
    places = (offsets + np.arange(m)) / m * mass
    flat = zip(cdf.reshape(-1, cdf.shape[-1]), places.reshape(-1, m), strict=True)
    ids = np.array([np.searchsorted(c, at, side="right") for c, at in flat])
    ids = ids.clip(max=dense.shape[-1] - 1).reshape(*topk_ids.shape[:-1], m)
    logprobs = np.take_along_axis(dense, ids, axis=-1)
    return {
        "tail_ids": ids.astype(np.int32),
        "tail_logprobs": logprobs,
        # r = p/t, so −log(m·r) = log t − log m − log p.
        "tail_logweights": (np.log(mass) - np.log(m) - logprobs).astype(np.float32),
    }


def rs_kd(n: int, shop: Workshop, rows: np.ndarray) -> tuple[Batch, float]:
    """RS-KD with n draws."""
    batch = rs_kd_targets(shop.teacher, rows, draws=n)
    stored = np.isfinite(batch["topk_logprobs"]).sum(-1)
    return batch, BYTES_PER_ID * float(stored.mean())


def angle(one: np.ndarray, other: np.ndarray) -> float:
    """In degrees."""
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
            raise FileNotFoundError(f"{path}: not there yet; the cell dense-T1 leaves it")
        return open_checkpoint(path).load(dtype=study.student_dtype, param_dtype="float32")
    source = open_checkpoint(study.teacher)
    return cut_layers(
        source, spread(study.layers, source.config.num_layers), dtype=study.student_dtype
    )


@lru_cache(maxsize=256)
def _exact(teacher: DenseTeacher, cache: Cache, row: int) -> tuple[Targets, np.ndarray]:
    """The 64 most likely ids and the tail's grid at the scored positions of a row."""
    scored = cache.read([int(row)], signals=())["loss_mask"][0]
    k = min(64, teacher.vocabulary - 1)
    found = _targets(teacher.hidden(np.array([row]))[0], teacher.unembedding, k=k)
    names = ("ids", "logprobs", "tail_logmass")
    return Targets(*(np.asarray(found[name])[scored] for name in names)), scored


_targets = jax.jit(exact_targets, static_argnames=("k",))


def _shortened(found: tuple[Targets, np.ndarray], k: int, teacher: DenseTeacher):
    return shortened(found[0], k=k, vocabulary=teacher.vocabulary), found[1]


def _joined(found: list[tuple[Targets, np.ndarray]]) -> Targets:
    names = ("ids", "logprobs", "tail_logmass")
    return Targets(*(np.concatenate([getattr(t, name) for t, _ in found]) for name in names))


def _empty(rows: int, length: int, k: int) -> Batch:
    return {
        "topk_ids": np.zeros((rows, length, k), np.int32),
        "topk_logprobs": np.full((rows, length, k), -np.inf, np.float32),
        "tail_logmass": np.full((rows, length, NODES), -np.inf, np.float32),
    }
