"""The teacher in a worker: one a process, its shapes fixed by the plan, its results on the host."""

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from models import open_checkpoint
from models.numerics import dtype_named, precision_for
from models.sharding import batch_sharding, make_mesh
from pipelines.prior import prior_sums
from pipelines.targets import targets
from pipelines.wanted import Wanted
from schemas.draws import Draws, starts
from schemas.plan import PlannedTeacher
from schemas.prior import TailPrior
from schemas.rows import Row
from schemas.targets import Targets

_lock = threading.Lock()
_loaded: dict[tuple[PlannedTeacher, Wanted], "TeacherRunner"] = {}


def teacher_for(planned: PlannedTeacher, wanted: Wanted) -> "TeacherRunner":
    """This process's teacher, loaded at the first call. Another teacher replaces it."""
    with _lock:
        if (planned, wanted) not in _loaded:
            _loaded.clear()
            _loaded[planned, wanted] = TeacherRunner(planned, wanted)
        return _loaded[planned, wanted]


@dataclass(frozen=True)
class RowTargets:
    """What the teacher says about one row: one target for each scored position."""

    targets: Targets
    near_edge: int = 0
    """Draws so near an edge that other rounding may draw a neighbour; see schemas.draws."""

    @property
    def finite(self) -> bool:
        """Whether the row may be stored: a NaN anywhere makes it unusable."""
        found = self.targets
        return not (np.isnan(found.logprobs).any() or np.isnan(found.tail_logmass).any())


class TeacherRunner:
    """Runs fixed-size batches of rows, the next one while the caller handles the last."""

    def __init__(self, planned: PlannedTeacher, wanted: Wanted):
        self.planned = planned
        self.wanted = wanted
        self._running = threading.Lock()  # two bundles in one process take turns on the device
        self._mesh = _mesh(planned)
        checkpoint = open_checkpoint(planned.model)
        model = checkpoint.load(dtype=planned.dtype, mesh=self._mesh)
        graph, self._weights = nnx.split(model)
        # Padded vocabularies hold rows that no token has; they must not collect mass.
        self._unembedding = jax.jit(lambda m: m.unembedding()[:, : planned.vocabulary_size])(model)
        # Two programs, so that calibration, which computes more, shares the larger one.
        self._forward = jax.jit(partial(_forward, graph))
        self._targets = jax.jit(partial(_targets, wanted=wanted))
        self._prior_sums = jax.jit(partial(_prior_sums, k=wanted.k))

    def run(self, rows: Iterable[Row], *, prior: "PriorSums | None" = None) -> Iterator[RowTargets]:
        """Targets of `rows`, in order, all of the planned length S; adds to `prior` if given.

        While the device computes a batch, the caller has the one before it; its encoding and
        writing cost nothing.
        """
        with self._running:
            waiting = None
            for batch in _batches(rows, self.planned.batch_rows):
                started = (batch, self._start(batch, prior))
                if waiting:
                    yield from _to_host(*waiting, self.wanted)
                waiting = started
            if waiting:
                yield from _to_host(*waiting, self.wanted)

    def _start(self, batch: Sequence[Row], prior: "PriorSums | None") -> dict[str, jax.Array]:
        names = ("tokens", "segment_ids", "positions", "loss_mask")
        inputs = {name: np.stack([getattr(row, name) for row in batch]) for name in names}
        inputs["starts"] = np.zeros(inputs["tokens"].shape, np.float32)
        if self.wanted.draws:
            length = self.planned.sequence_length
            inputs["starts"] = np.stack([starts(row.key, positions=length) for row in batch])
        missing = self.planned.batch_rows - len(batch)
        on_device = {
            name: jax.device_put(np.pad(array, ((0, missing), (0, 0))), batch_sharding(self._mesh))
            for name, array in inputs.items()
        }
        hidden = self._forward(self._weights, *(on_device[name] for name in names[:3]))
        if prior:
            prior.add(self._prior_sums(hidden, self._unembedding, on_device["loss_mask"]))
        return self._targets(hidden, self._unembedding, on_device["starts"])


class PriorSums:
    """The tail prior of the rows that were run, added up in float64."""

    def __init__(self):
        self._totals: list[np.ndarray] = []

    def add(self, sums: tuple[jax.Array, jax.Array]) -> None:
        """Add a batch's; waits for it. A row with NaN spoils its batch, which then is left out."""
        new = [np.asarray(x, np.float64) for x in sums]
        if np.isfinite(new[0]).all():
            old = self._totals or [np.zeros_like(x) for x in new]
            self._totals = [a + b for a, b in zip(old, new, strict=True)]

    def result(self) -> TailPrior | None:
        """What `schemas.prior` stores; None if every batch was spoilt."""
        return TailPrior(*self._totals) if self._totals else None


def _forward(graph, weights, tokens, segment_ids, positions):
    return nnx.merge(graph, weights)(tokens, segment_ids, positions)[0]


def _targets(hidden, unembedding, starts, *, wanted: Wanted):
    batch, time, width = hidden.shape
    flat = hidden.reshape(batch * time, width)
    found = targets(flat, unembedding, starts.reshape(-1), wanted=wanted)
    return {name: x.reshape(batch, time, *x.shape[1:]) for name, x in found.items()}


def _prior_sums(hidden, unembedding, counted, *, k: int):
    return prior_sums(hidden.reshape(-1, hidden.shape[-1]), unembedding, counted.reshape(-1), k=k)


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _to_host(
    batch: Sequence[Row], found: dict[str, jax.Array], wanted: Wanted
) -> Iterator[RowTargets]:
    host = jax.device_get(found)
    for i, row in enumerate(batch):
        of_row = {name: x[i][row.loss_mask] for name, x in host.items()}
        drawn, near = None, 0
        if wanted.draws:
            drawn = Draws(of_row["draw_ids"], of_row["draw_logprobs"], wanted.draw_betas)
            near = int(of_row["near_edge"].sum())
        top = Targets(of_row["ids"], of_row["logprobs"], of_row["tail_logmass"], drawn)
        yield RowTargets(top, near)


def _mesh(planned: PlannedTeacher) -> Mesh:
    """All devices that the frozen batch can be split over."""
    devices = jax.local_devices()
    groups = math.gcd(len(devices) // planned.tensor_parallel, planned.batch_rows)
    return make_mesh(
        tensor=planned.tensor_parallel,
        devices=devices[: groups * planned.tensor_parallel] if groups else devices,
    )


def default_batch_rows(sequence_length: int) -> int:
    """About 2,048 tokens on CPU, 32,768 on accelerators; a multiple of their number."""
    tokens = 2048 if jax.default_backend() == "cpu" else 32_768
    devices = jax.local_device_count()
    return -(-max(1, tokens // sequence_length) // devices) * devices


def numerics(dtype: str) -> str:
    """How the teacher computes, as it goes into teacher_id."""
    precision = precision_for(dtype_named(dtype)).name.lower()
    return f"{dtype} operands, {precision} precision, float32 sums"
