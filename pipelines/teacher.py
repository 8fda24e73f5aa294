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
from pipelines.targets import targets
from schemas.plan import PlannedTeacher
from schemas.rows import Row
from schemas.targets import Targets

_lock = threading.Lock()
_loaded: dict[tuple[PlannedTeacher, int], "TeacherRunner"] = {}


def teacher_for(planned: PlannedTeacher, *, k: int) -> "TeacherRunner":
    """This process's teacher, loaded at the first call. Another teacher replaces it."""
    with _lock:
        if (planned, k) not in _loaded:
            _loaded.clear()
            _loaded[planned, k] = TeacherRunner(planned, k=k)
        return _loaded[planned, k]


@dataclass(frozen=True)
class RowTargets:
    """What the teacher says about one row: one target for each scored position."""

    targets: Targets

    @property
    def finite(self) -> bool:
        """Whether the row may be stored: a NaN anywhere makes it unusable."""
        found = self.targets
        return not (np.isnan(found.logprobs).any() or np.isnan(found.tail_logmass).any())


class TeacherRunner:
    """Runs fixed-size batches of rows, the next one while the caller handles the last."""

    def __init__(self, planned: PlannedTeacher, *, k: int):
        self.planned = planned
        self._running = threading.Lock()  # two bundles in one process take turns on the device
        self._mesh = _mesh(planned)
        checkpoint = open_checkpoint(planned.model)
        model = checkpoint.load(dtype=planned.dtype, mesh=self._mesh)
        graph, self._weights = nnx.split(model)
        # Padded vocabularies hold rows that no token has; they must not collect mass.
        self._unembedding = jax.jit(lambda m: m.unembedding()[:, : planned.vocabulary_size])(model)
        self._forward = jax.jit(partial(_forward, graph, k=k))

    def run(self, rows: Iterable[Row]) -> Iterator[RowTargets]:
        """Targets of `rows`, in order, all of the planned length S.

        While the device computes a batch, the caller has the one before it; its encoding and
        writing cost nothing.
        """
        with self._running:
            waiting = None
            for batch in _batches(rows, self.planned.batch_rows):
                started = (batch, self._start(batch))
                if waiting:
                    yield from _to_host(*waiting)
                waiting = started
            if waiting:
                yield from _to_host(*waiting)

    def _start(self, batch: Sequence[Row]) -> dict[str, jax.Array]:
        missing = self.planned.batch_rows - len(batch)
        arrays = (
            np.pad(np.stack([getattr(row, name) for row in batch]), ((0, missing), (0, 0)))
            for name in ("tokens", "segment_ids", "positions")
        )
        sharded = (jax.device_put(array, batch_sharding(self._mesh)) for array in arrays)
        return self._forward(self._weights, self._unembedding, *sharded)


def _forward(graph, weights, unembedding, tokens, segment_ids, positions, *, k: int):
    hidden, _ = nnx.merge(graph, weights)(tokens, segment_ids, positions)
    batch, time, width = hidden.shape
    found = targets(hidden.reshape(batch * time, width), unembedding, k=k)
    return {name: x.reshape(batch, time, *x.shape[1:]) for name, x in found.items()}


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _to_host(batch: Sequence[Row], found: dict[str, jax.Array]) -> Iterator[RowTargets]:
    host = jax.device_get(found)
    for i, row in enumerate(batch):
        yield RowTargets(Targets(**{name: x[i][row.loss_mask] for name, x in host.items()}))


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
