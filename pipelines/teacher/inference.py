"""The teacher in a worker: one a process, its shapes fixed by the plan, its results on the host."""

import dataclasses
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from decant.models import open_checkpoint
from decant.models.checkpoints.checkpoint import Quantize
from decant.models.mesh.sharding import DATA, batch_sharding, teacher_mesh
from decant.models.numerics import dtype_named, precision_for
from decant.pipelines.teacher.sharded_head import Head
from decant.pipelines.teacher.states_and_maps import finite_rows, keeping, only_read, stored_states
from decant.pipelines.teacher.targets import targets
from decant.schemas.manifest.plan import PlannedTeacher, TeacherMesh
from decant.schemas.records.rows import Row, stored_positions
from decant.schemas.signals import MEAN, ArraySignal, AttentionSignal, HiddenSignal, TargetSpec
from decant.schemas.targets.draws import Draws, uniform_starts
from decant.schemas.targets.targets import Targets

_lock = threading.Lock()
_loaded: dict[PlannedTeacher, "TeacherRunner"] = {}


def teacher_for(planned: PlannedTeacher) -> "TeacherRunner":
    """This process's teacher, loaded at the first call. Another teacher replaces it."""
    with _lock:
        if planned not in _loaded:
            _loaded.clear()
            _loaded[planned] = TeacherRunner(planned)
        return _loaded[planned]


def unload() -> None:
    """Let go of this process's teacher; its memory is free once nobody else holds it."""
    with _lock:
        _loaded.clear()


@dataclass(frozen=True, eq=False)
class Asked:
    """What is to come out for each row."""

    targets: TargetSpec | None = None
    arrays: Mapping[str, ArraySignal] = field(default_factory=dict)
    """Signals by name."""
    directions: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What a signal's states are projected onto, by name; absent for those that are whole."""

    @property
    def layers(self) -> set[int]:
        """Hidden layers that the arrays are made from: block i's map from what it reads."""
        return {signal.layer for signal in self.arrays.values()}


@dataclass(frozen=True)
class RowOutput:
    """What the teacher says about one row."""

    finite: bool
    """Whether the row may be stored: a NaN anywhere makes it unusable."""
    targets: Targets | None
    """One for each scored position, if asked for."""
    arrays: dict[str, np.ndarray]
    """By the stored array's name, as decant.schemas.arrays.spec stores them."""
    near_edge: int = 0
    """Draws so near an edge that other rounding may draw a neighbour; see schemas.targets.draws."""


class OnDevice(NamedTuple):
    """A batch that the teacher has read: what went in, and what its layers gave."""

    inputs: dict[str, jax.Array]
    """tokens, segment_ids, positions, loss_mask [batch, time]; rows that fill the batch are 0."""
    hidden: jax.Array
    """After the final norm, [batch, time, width]."""
    layers: dict[int, jax.Array]
    """Hidden states of the layers that somebody asked for."""
    unembedding: jax.Array
    head: Head
    """How the last two make logits."""


@runtime_checkable
class Observer(Protocol):
    """Something that adds up what it sees of a run, as calibration does."""

    @property
    def layers(self) -> Sequence[int]:
        """Hidden layers that it looks at."""
        ...

    def see(self, batch: OnDevice) -> None:
        """Look at a batch."""
        ...


class TeacherRunner:
    """Runs fixed-size batches of rows, the next one while the caller handles the last."""

    def __init__(self, planned: PlannedTeacher):
        self.planned = planned
        self._running = threading.Lock()  # two bundles in one process take turns on the device
        self._mesh = mesh_of(planned)
        checkpoint = open_checkpoint(planned.model)
        model = checkpoint.load(dtype=planned.dtype, quantize=planned.quantize, mesh=self._mesh)
        graph, self._weights = nnx.split(model)
        self._head = Head.of(model, vocabulary_size=planned.vocabulary_size, mesh=self._mesh)
        self._unembedding = self._head.unembedding(model)
        # Several programs, so that calibration, which computes more, shares the larger ones.
        self._forward = jax.jit(partial(forward, graph), static_argnames="layers")
        self._targets = jax.jit(row_targets, static_argnames=("spec", "head"))
        # The layer is an argument: all maps of a kind are one program.
        self._maps = jax.jit(partial(_maps, graph), static_argnames="signal")

    def run(
        self, rows: Iterable[Row], asked: Asked, *, observers: Sequence[Observer] = ()
    ) -> Iterator[RowOutput]:
        """What is asked of `rows`, in order, all of the planned length S.

        While the device computes a batch, the caller has the one before it; its encoding and
        writing cost nothing.
        """
        with self._running:
            waiting = None
            for batch in _batches(rows, self.planned.batch_rows):
                started = (batch, self._start(batch, asked, observers))
                if waiting:
                    yield from _to_host(*waiting, asked)
                waiting = started
            if waiting:
                yield from _to_host(*waiting, asked)

    def _start(
        self, batch: Sequence[Row], asked: Asked, observers: Sequence[Observer]
    ) -> dict[str, Any]:
        on_device = self._read(batch, asked.layers.union(*(o.layers for o in observers)))
        for observer in observers:
            observer.see(on_device)
        found: dict[str, Any] = {"arrays": {}, "finite": {}}
        for name, signal in asked.arrays.items():
            states = on_device.layers[signal.layer]
            found["finite"][name] = _finite_rows(states, on_device.inputs["segment_ids"])
            found["arrays"] |= self._stored(name, signal, on_device, asked.directions.get(name))
        if asked.targets:
            starts_BT = self._on_device(self._starts(batch, asked.targets))
            found["targets"] = self._targets(
                on_device.hidden,
                self._unembedding,
                starts_BT,
                spec=asked.targets,
                head=self._head,
            )
        return found

    def _read(self, batch: Sequence[Row], layers: Iterable[int]) -> OnDevice:
        inputs = {
            name: self._on_device(np.stack([getattr(row, name) for row in batch]))
            for name in ("tokens", "segment_ids", "positions", "loss_mask")
        }
        read = (inputs["tokens"], inputs["segment_ids"], inputs["positions"])
        hidden, chosen = self._forward(self._weights, *read, layers=tuple(sorted(layers)))
        return OnDevice(inputs, hidden, chosen, self._unembedding, self._head)

    def _on_device(self, rows: np.ndarray) -> jax.Array:
        missing = self.planned.batch_rows - len(rows)
        return jax.device_put(np.pad(rows, ((0, missing), (0, 0))), batch_sharding(self._mesh))

    def _starts(self, batch: Sequence[Row], spec: TargetSpec) -> np.ndarray:
        length = self.planned.sequence_length
        if not spec.draws:
            return np.zeros((len(batch), length), np.float32)
        return np.stack([uniform_starts(row.key, positions=length) for row in batch])

    def _stored(
        self, name: str, signal: ArraySignal, batch: OnDevice, directions: np.ndarray | None
    ) -> dict[str, jax.Array]:
        states, segment_ids = batch.layers[signal.layer], batch.inputs["segment_ids"]
        read = _stored_positions(segment_ids, batch.inputs["loss_mask"])
        if isinstance(signal, HiddenSignal):
            stored = _stored_states(states, read, directions, dtype=signal.dtype)
            return {name + suffix: array for suffix, array in stored.items()}
        anonymous = dataclasses.replace(signal, layer=0, signal_id="")
        positions = batch.inputs["positions"]
        maps = self._maps(
            self._weights, states, segment_ids, positions, read, signal.layer, signal=anonymous
        )
        return {name: maps}


_finite_rows = jax.jit(finite_rows)
_stored_positions = jax.jit(partial(stored_positions, xp=jnp))
_stored_states = jax.jit(stored_states, static_argnames="dtype")


def forward(graph, weights, tokens, segment_ids, positions, *, layers):
    """The model's states after the final norm, and those of `layers`."""
    model = nnx.merge(graph, weights)
    return model(tokens, segment_ids, positions, hidden_layers=layers)


def row_targets(hidden, unembedding, starts, *, spec: TargetSpec, head: Head):
    """Each device takes its rows and its part of the vocabulary; logits stay where they are."""

    def of_device(hidden, unembedding, starts):
        batch, time, width = hidden.shape
        flat = hidden.reshape(batch * time, width)
        found = targets(flat, unembedding, starts.reshape(-1), spec=spec, head=head)
        return {name: x.reshape(batch, time, *x.shape[1:]) for name, x in found.items()}

    return head.on_each_device(of_device, hidden, unembedding, starts, out=P(DATA))


def _maps(graph, weights, states, segment_ids, positions, read, layer, *, signal: AttentionSignal):
    heads = None if signal.heads == MEAN else signal.heads
    maps = nnx.merge(graph, weights).attention_maps(
        states, segment_ids, positions, layer=layer, heads=heads, keep=keeping(signal)
    )
    return only_read(maps, read)


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _to_host(batch: Sequence[Row], found: dict[str, Any], asked: Asked) -> Iterator[RowOutput]:
    host = jax.device_get(found)
    for i, row in enumerate(batch):
        finite = all(of_batch[i] for of_batch in host["finite"].values())
        targets, near = None, 0
        if asked.targets:
            of_row = {name: x[i][row.loss_mask] for name, x in host["targets"].items()}
            targets, near = _row_targets(of_row, asked.targets)
            finite &= not (np.isnan(targets.logprobs).any() or np.isnan(targets.tail_logmass).any())
        arrays = {name: x[i] for name, x in host["arrays"].items()}
        yield RowOutput(bool(finite), targets, arrays, near)


def _row_targets(of_row: dict[str, np.ndarray], spec: TargetSpec) -> tuple[Targets, int]:
    drawn, near = None, 0
    if spec.draws:
        drawn = Draws(of_row["draw_ids"], of_row["draw_logprobs"], spec.draw_betas)
        near = int(of_row["near_edge"].sum())
    return Targets(of_row["ids"], of_row["logprobs"], of_row["tail_logmass"], drawn), near


def mesh_of(planned: PlannedTeacher) -> Mesh:
    """The planned mesh; where it leaves open how many groups split the batch, as many as divide it.

    ValueError for groups that do not.
    """
    shape, rows = planned.mesh, planned.batch_rows
    data = shape.data or math.gcd(groups_of(shape), rows) or None
    if data and rows % data:
        raise ValueError(
            f"teacher.batch_rows is {rows}, which mesh.data = {data} does not divide; choose a "
            "multiple"
        )
    return teacher_mesh(data=data, tensor=shape.tensor, expert=shape.expert)


def groups_of(shape: TeacherMesh) -> int:
    """Copies of the model that fit this host's devices."""
    return shape.data or jax.local_device_count() // (shape.tensor * shape.expert)


def numerics(dtype: str, quantize: Quantize) -> str:
    """How the teacher computes, as it goes into teacher_id."""
    precision = precision_for(dtype_named(dtype)).name.lower()
    weights = ", int8 weights by output channel" if quantize == "int8" else ""
    return f"{dtype} operands, {precision} precision, float32 sums{weights}"
