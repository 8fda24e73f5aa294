"""The teacher loaded on this host's devices: one a process, run over fixed-size batches of rows."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx

from decant.models import open_checkpoint
from decant.models.mesh.sharding import batch_sharding, replicate
from decant.pipelines.teacher import programs
from decant.pipelines.teacher.outputs import OutputSpec, RowOutput, row_outputs
from decant.pipelines.teacher.placement import planned_mesh
from decant.pipelines.teacher.sharded_head import Head
from decant.pipelines.teacher.targets import LogitsSpec, TokenInputs
from decant.schemas.manifest.plan import PlannedTeacher
from decant.schemas.records.rows import Row, next_tokens
from decant.schemas.signals import ArraySignal, HiddenSignal
from decant.schemas.targets.draws import COUNTS_STREAM, TAIL_STREAM, uniform_starts

_lock = threading.Lock()
_loaded: dict[PlannedTeacher, "LoadedTeacher"] = {}


def loaded_teacher(planned: PlannedTeacher) -> "LoadedTeacher":
    """This process's teacher. The first call loads it; a call with another plan replaces it."""
    with _lock:
        if planned not in _loaded:
            _loaded.clear()
            _loaded[planned] = LoadedTeacher(planned)
        return _loaded[planned]


def unload() -> None:
    """Drop this process's teacher. Its memory is free once no other code refers to it."""
    with _lock:
        _loaded.clear()


class DeviceBatch(NamedTuple):
    """A batch on the devices after the forward pass: its inputs and its hidden states."""

    inputs: dict[str, jax.Array]
    """tokens, segment_ids, positions, loss_mask, each [batch, time]. Rows that only fill the batch
    up are 0."""
    hidden: jax.Array
    """States after the final norm, [batch, time, width]."""
    layers: dict[int, jax.Array]
    """States of the requested hidden layers, each [batch, time, width], by layer."""
    unembedding: jax.Array
    """[width, vocabulary], sharded over the vocabulary."""
    head: Head
    """Computes logits from `hidden` and `unembedding`."""


@runtime_checkable
class Observer(Protocol):
    """Accumulates a statistic over the batches of a run. Calibration has several."""

    @property
    def layers(self) -> Sequence[int]:
        """Hidden layers that it needs in `DeviceBatch.layers`."""
        ...

    def observe(self, batch: DeviceBatch) -> None:
        """Add a batch to the statistic."""
        ...


class LoadedTeacher:
    """A teacher's weights on the devices, and its compiled programs."""

    def __init__(self, planned: PlannedTeacher):
        """Load the weights. ValueError if the planned mesh does not fit batch or devices."""
        self.planned = planned
        self._running = threading.Lock()  # two bundles in one process take turns on the device
        self._mesh = planned_mesh(planned)
        checkpoint = open_checkpoint(planned.model)
        model = checkpoint.load(dtype=planned.dtype, quantize=planned.quantize, mesh=self._mesh)
        graph, self._weights = nnx.split(model)
        self._head = Head.of(model, vocabulary_size=planned.vocabulary_size, mesh=self._mesh)
        self._unembedding = self._head.unembedding(model)
        # Several programs, so that calibration, which computes more, shares the larger ones.
        self._forward = jax.jit(partial(programs.forward, graph), static_argnames="layers")
        self._targets = jax.jit(programs.batch_targets, static_argnames=("spec", "head"))
        self._one_attention = not checkpoint.config.several_attentions
        self._maps = jax.jit(partial(programs.attention_maps, graph), static_argnames="signal")

    @contextlib.contextmanager
    def run(
        self, rows: Iterable[Row], spec: OutputSpec, *, observers: Sequence[Observer] = ()
    ) -> Iterator[Iterator[RowOutput]]:
        """The outputs that `spec` asks for, row by row in order. Rows have the planned length S.

        The `with` block has the devices to itself until it ends, also by an error. The devices
        compute a batch while the block handles the rows of the batch before, so encoding and
        writing rows takes no extra time.
        """
        with self._running:
            yield self._outputs(rows, spec, observers)

    def _outputs(
        self, rows: Iterable[Row], spec: OutputSpec, observers: Sequence[Observer]
    ) -> Iterator[RowOutput]:
        rows, waiting = iter(rows), None
        while batch := list(islice(rows, self.planned.batch_rows)):
            started = (batch, self._start(batch, spec, observers))
            if waiting:
                yield from row_outputs(*waiting, spec)
            waiting = started
        if waiting:
            yield from row_outputs(*waiting, spec)

    def _start(
        self, batch: Sequence[Row], spec: OutputSpec, observers: Sequence[Observer]
    ) -> dict[str, Any]:
        """Dispatch a batch's programs; returns their outputs as `row_outputs` takes them."""
        on_device = self._read(batch, spec.layers.union(*(o.layers for o in observers)))
        for observer in observers:
            observer.observe(on_device)
        outputs: dict[str, Any] = {"targets": {}, "arrays": {}, "finite": {}}
        for name, signal in spec.arrays.items():
            states = on_device.layers[signal.layer]
            finite = programs.finite_rows(states, on_device.inputs["segment_ids"])
            outputs["finite"][name] = finite
            outputs["arrays"] |= self._stored(name, signal, on_device, spec.directions.get(name))
        if of_logits := spec.of_logits:
            outputs["targets"] = self._targets(
                on_device.hidden,
                self._unembedding,
                self._token_inputs(batch, of_logits),
                spec=of_logits,
                head=self._head,
            )
        if spec.sketch:
            outputs["sketch"] = programs.sketches(on_device.hidden, *spec.sketch)
        return outputs

    def replicated(self, array: np.ndarray) -> jax.Array:
        """The array whole on every device."""
        return replicate(array, self._mesh)

    def _read(self, batch: Sequence[Row], layers: Iterable[int]) -> DeviceBatch:
        inputs = {
            name: self._on_device(_stacked(batch, name))
            for name in ("tokens", "segment_ids", "positions", "loss_mask")
        }
        read = (inputs["tokens"], inputs["segment_ids"], inputs["positions"])
        hidden, chosen = self._forward(self._weights, *read, layers=tuple(sorted(layers)))
        return DeviceBatch(inputs, hidden, chosen, self._unembedding, self._head)

    def _on_device(self, rows: np.ndarray) -> jax.Array:
        missing = self.planned.batch_rows - len(rows)
        return jax.device_put(np.pad(rows, ((0, missing), (0, 0))), batch_sharding(self._mesh))

    def _token_inputs(self, batch: Sequence[Row], spec: LogitsSpec) -> TokenInputs:
        length, asked = self.planned.sequence_length, spec.targets

        def starts(stream: bytes) -> jax.Array:
            of_rows = [uniform_starts(row.key, positions=length, stream=stream) for row in batch]
            return self._on_device(np.stack(of_rows))

        labels = asked and asked.labels
        return TokenInputs(
            starts=starts(TAIL_STREAM) if asked and asked.draws else None,
            labels=self._on_device(next_tokens(_stacked(batch, "tokens"))) if labels else None,
            counts_starts=starts(COUNTS_STREAM) if spec.counts else None,
        )

    def _stored(
        self, name: str, signal: ArraySignal, batch: DeviceBatch, directions: np.ndarray | None
    ) -> dict[str, jax.Array]:
        """The arrays that the signal stores of the batch, by stored name."""
        states, segment_ids = batch.layers[signal.layer], batch.inputs["segment_ids"]
        stored = programs.stored_mask(segment_ids, batch.inputs["loss_mask"])
        if isinstance(signal, HiddenSignal):
            arrays = programs.encoded_states(states, stored, directions, dtype=signal.dtype)
            return {name + suffix: array for suffix, array in arrays.items()}
        # Signals that differ in the layer alone share one compiled program.
        inputs = self._weights, states, segment_ids, batch.inputs["positions"], stored
        signal = dataclasses.replace(signal, signal_id="")
        if self._one_attention:
            of_any_layer = dataclasses.replace(signal, layer=0)
            maps = self._maps(*inputs, signal.layer, signal=of_any_layer)
        else:
            maps = self._maps(*inputs, signal=signal)
        return {name: maps}


def _stacked(batch: Sequence[Row], name: str) -> np.ndarray:
    return np.stack([getattr(row, name) for row in batch])
