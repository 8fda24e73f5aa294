"""The training loop: a thin shell round the pure step that logs, judges, saves and stops.

Metrics are fetched one update late, so that the device always has the next one to work on.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from decant.models import Decoder
from decant.models.mesh.accelerator import unused_accelerator
from decant.models.mesh.sharding import everywhere, rows_here, rows_split, student_mesh
from decant.schemas import Cache, open_cache
from decant.trainer.config import MeshShape, Optimiser, Train
from decant.trainer.data.batches import Batches, updates
from decant.trainer.data.mixture import check_mixture, open_others, taught
from decant.trainer.judging.heldout import Evaluator, make_evaluator
from decant.trainer.loss.layer_pairs import Pairs
from decant.trainer.loss.projections import (
    initial_projections,
    saved_projections,
    with_projections,
    without_projections,
)
from decant.trainer.run.binding import Bound, as_begun, bind
from decant.trainer.run.checkpoint import Checkpoints, latest_step
from decant.trainer.run.compilation_cache import keep_compiled
from decant.trainer.run.metrics import Metrics
from decant.trainer.run.processes import Agreement, Silent, first, in_turn, join
from decant.trainer.run.provenance import facts, record_facts
from decant.trainer.run.requirements import check_cache, directions, settled, tail_prior
from decant.trainer.run.speed import Clock, peak_flops, update_flops
from decant.trainer.run.student import initial_student, parameters, saved_initial
from decant.trainer.update.step import TrainState, initial_state, make_train_step, to_device


def train(config: Train) -> bool:
    """Train, or go on training, until the last update; see `Train`. False: a signal came before."""
    join(config.distributed)
    if config.compilation_cache:
        keep_compiled(config.run)
    cache = as_begun(open_cache(config.cache), run=config.run)
    steps = updates(cache, config=config.data)
    mesh = mesh_of(config.mesh)
    _check(config, steps=steps, shares=rows_split(mesh))
    check_cache(cache, loss=config.loss)
    config, pairs = settled(config, cache=cache)
    others = open_others(config.data)
    check_mixture(cache, others, loss=config.loss, pairs=pairs)
    prior = tail_prior(cache, loss=config.loss, mesh=mesh, others=taught(others))
    along = directions(cache, pairs=pairs, mesh=mesh)
    bound, student, projections = in_turn(
        lambda: _begin(config, cache=cache, others=others, steps=steps, pairs=pairs, mesh=mesh)
    )
    graph, state = _first_state(student, projections, config=config.optimiser, mesh=mesh)
    flops = update_flops(
        student.config, rows=config.data.batch_rows, length=cache.manifest.sequence_length
    )
    del student
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(config.run, keep=config.keep)
        stack.callback(checkpoints.close)
        batches = Batches(
            cache,
            config=config.data,
            others=others,
            signals=pairs.signals,
            here=rows_here(mesh, config.data.batch_rows),
        )
        stack.callback(batches.close)
        if checkpoints.latest is not None:
            state, saved = checkpoints.restore(state)
            bound.require_same(saved.get("binding"), where=f"{config.run}, its checkpoint")
            batches.restore(saved, allows=bound.allows)
        metrics = cast(Metrics, Silent())
        if first():
            metrics = Metrics(
                config.run,
                after=checkpoints.latest,
                steps=steps,
                quiet=config.quiet,
                as_json=config.json,
            )
        stack.callback(metrics.close)
        if notice := unused_accelerator():
            metrics.say(notice)
        training = Training(
            config=config,
            steps=steps,
            signals=pairs.signals,
            batches=batches,
            checkpoints=checkpoints,
            bound=bound,
            metrics=metrics,
            mesh=mesh,
            step=make_train_step(
                graph,
                config=config,
                vocabulary=cache.manifest.vocabulary_size,
                steps=steps,
                prior=prior,
                pairs=pairs,
                directions=along,
                mesh=mesh,
                places=jax.tree.map(lambda x: x.sharding, state),
            ),
            # Its own cache: the one above is read by the prefetching thread.
            judge=make_evaluator(
                graph,
                cache=as_begun(open_cache(config.cache), run=config.run),
                rows=config.heldout_rows,
                batch_rows=config.data.batch_rows // config.data.microbatches,
                chunk_tokens=config.loss.chunk_tokens,
                mesh=mesh,
            ),
            clock=Clock(flops=flops, peak=peak_flops(mesh.devices.ravel().tolist())),
        )
        state = training.run(state, stopping=stack.enter_context(_stop_signals()))
        return int(state.step) == steps


def load_run(
    run: Path, *, dtype: str, checkpoint: str = "last"
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Graph and parameters of a run's checkpoint: `last` (the initial student if there is none
    yet), `best`, or a number of updates. ValueError if there is no such checkpoint."""
    # In shares: what a mesh has trained need not fit one device.
    mesh = student_mesh(fsdp=jax.device_count())
    model, projections = saved_initial(run, dtype=dtype, mesh=mesh), saved_projections(run)
    graph, params = _on_mesh(model, projections, mesh=mesh)
    checkpoints = Checkpoints(run, read_only=True)
    step = checkpoints.called(checkpoint)
    if step is not None:
        params = checkpoints.restore_parameters(params, step=step)
    checkpoints.close()
    return graph, without_projections(params)


@dataclass(frozen=True)
class Training:
    """What a run works with, looked up once."""

    config: Train
    steps: int
    signals: tuple[str, ...]
    """What of the cache beside `logits` goes to the device."""
    batches: Batches
    checkpoints: Checkpoints
    bound: Bound
    metrics: Metrics
    mesh: Mesh
    step: Callable[[TrainState, dict], tuple[TrainState, dict]]
    judge: Evaluator
    clock: Clock = field(default_factory=Clock)

    def run(self, state: TrainState, *, stopping: Sequence[int] = ()) -> TrainState:
        """Updates from the state's step to the last, or until a signal asks to stop."""
        config, report = self.config, _Report(self.config, self.metrics, self.clock)
        agreed = Agreement(self.mesh)
        done, stop = int(state.step), False
        if done == 0:
            self._judge(0, state)
        while done < self.steps and not stop:
            batch = self.batches.next()
            batch_there = to_device(
                batch,
                mesh=self.mesh,
                rows=config.data.batch_rows,
                tail=config.loss.tail,
                signals=self.signals,
            )
            state, latest = self.step(state, batch_there)
            done += 1
            report.add(done, batch["rows"], latest)
            end, stop = done == self.steps, agreed(bool(stopping))
            judge = end or done % config.evaluate_every == 0
            save = end or stop or done % config.checkpoint_every == 0
            if judge or save:
                report.flush()
            judged = self._judge(done, state) if judge else None
            if save := save or self.checkpoints.due(done, judged=judged):
                data = {**self.batches.state(), "binding": self.bound.values}
                self.checkpoints.save(state, data=data, judged=judged)
            if judge or save:
                self.clock.restart()
        if done < self.steps:
            self.metrics.say(
                f"stopped after update {done} of {self.steps}; saved in {config.run}. To go on, "
                f"run the same command again:\n  decant {shlex.join(sys.argv[1:])}"
            )
        return state

    def _judge(self, step: int, state: TrainState) -> dict[str, Any]:
        judged = self.judge(state.params)
        self.metrics.judged({"step": step, **judged})
        return judged


class _Report:
    """Hands metrics on once the next update is under way, and stops a run that has gone bad."""

    def __init__(self, config: Train, metrics: Metrics, clock: Clock):
        self._config, self._metrics, self._clock = config, metrics, clock
        self._pending: tuple[int, np.ndarray, dict[str, jax.Array]] | None = None
        clock.restart()

    def add(self, step: int, rows: np.ndarray, metrics: dict[str, jax.Array]) -> None:
        self.flush()
        self._pending = (step, rows, metrics)

    def flush(self) -> None:
        """Wait for the pending update and report it."""
        if self._pending is None:
            return
        step, rows, on_device = self._pending
        self._pending = None
        values: dict[str, Any] = {"step": step}
        values |= {name: np.asarray(value).item() for name, value in on_device.items()}
        values["tokens"] = int(values["tokens"])
        self._clock.add(values["tokens"])
        bad = values["skipped_in_a_row"] > 0
        if bad:
            values["skipped_rows"] = rows.tolist()
        if bad or step % self._config.log_every == 0:
            self._metrics.log({**values, **self._clock.read()})
        if values["skipped_in_a_row"] >= self._config.max_bad_steps:
            raise FloatingPointError(
                f"{self._config.run}: {values['skipped_in_a_row']} updates in a row had a "
                f"non-finite loss or gradient, the last at step {step} with rows {rows.tolist()} "
                "(all of them are in metrics.jsonl as skipped_rows). Lower "
                "optimiser.learning_rate, use dtype = float32, or look at these rows with "
                "`decant inspect`"
            )


def mesh_of(shape: MeshShape) -> Mesh:
    """The mesh of a config, of the devices of all processes."""
    return student_mesh(data=shape.data, fsdp=shape.fsdp, tensor=shape.tensor)


def _begin(
    config: Train,
    *,
    cache: Cache,
    others: Sequence[Cache],
    steps: int,
    pairs: Pairs,
    mesh: Mesh,
) -> tuple[Bound, Decoder, dict[str, np.ndarray]]:
    """What the run is bound to, its first student and projections, all of it in its directory."""
    config.run.mkdir(parents=True, exist_ok=True)
    bound = bind(
        config,
        cache=cache,
        others=others,
        steps=steps,
        signals=pairs.signals,
        after=latest_step(config.run),
    )
    if first():
        each = [facts(one, signals=pairs.signals) for one in (cache, *others)]
        record_facts(config.run, each)
    student = initial_student(
        config.student,
        cache=cache,
        run=config.run,
        dtype=config.dtype,
        seed=config.data.seed,
        mesh=mesh,
    )
    projections = initial_projections(
        pairs, width=student.config.hidden_size, run=config.run, seed=config.data.seed
    )
    return bound, student, projections


def _first_state(
    model: Decoder, projections: dict[str, np.ndarray], *, config: Optimiser, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """The state before the first update, every array where the mesh wants it."""
    graph, params = _on_mesh(model, projections, mesh=mesh)
    return graph, initial_state(params, config=config, mesh=mesh)


def _on_mesh(
    model: Decoder, projections: dict[str, np.ndarray], *, mesh: Mesh
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    graph, params = parameters(model)
    # Small beside the student, and whole on every device: only rows are split there.
    there = {name: everywhere(x, mesh) for name, x in projections.items()}
    return graph, with_projections(params, there)


def _check(config: Train, *, steps: int, shares: int) -> None:
    rows, pieces = config.data.batch_rows, config.data.microbatches
    if rows % (pieces * shares):
        raise ValueError(
            f"data.batch_rows = {rows} does not divide into {pieces} microbatches on {shares} "
            f"devices (mesh.data · mesh.fsdp); choose a multiple of {pieces * shares}"
        )
    if steps < 1:
        raise ValueError(f"{config.cache}: its train rows do not fill one batch of {rows} rows")


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C or a termination asks to stop; a second one is obeyed."""
    stopping: list[int] = []
    previous = {}

    def stop(number: int, _frame: Any) -> None:
        stopping.append(number)
        for which, handler in previous.items():
            signal.signal(which, handler)

    for which in (signal.SIGINT, signal.SIGTERM):
        previous[which] = signal.signal(which, stop)
    try:
        yield stopping
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)
