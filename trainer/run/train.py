"""The command `train`: check the settings, build or restore the state, run the loop."""

from __future__ import annotations

import contextlib
import copy
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from decant.models import Decoder
from decant.models.mesh.accelerator import unused_accelerator
from decant.models.mesh.execution import Execution
from decant.models.mesh.sharding import local_rows, row_shard_count, student_mesh
from decant.schemas import Cache
from decant.schemas.reading.held import loss_targets, tail_signals
from decant.trainer.config import Optimiser, Train
from decant.trainer.data.batches import Batches, number_of_updates
from decant.trainer.data.mixture import caches_with_targets, check_mixture, open_for, open_others
from decant.trainer.judging.heldout import Evaluator, heldout_rows, make_evaluator
from decant.trainer.loss.batch_fields import check_targets
from decant.trainer.loss.frozen import joined, trained_and_frozen
from decant.trainer.loss.layer_pairs import Pairs
from decant.trainer.loss.objective import Objective, Tables
from decant.trainer.loss.projections import Parameters, initial_projections
from decant.trainer.run.adapter_check import check_adapter
from decant.trainer.run.binding import BINDING, Binding, bind, cache_at_start
from decant.trainer.run.checkpoint import Checkpoints, latest_step
from decant.trainer.run.checksums import require_finite, summarise
from decant.trainer.run.compilation_cache import keep_compiled_programs
from decant.trainer.run.data_facts import write_data_facts
from decant.trainer.run.full_disk import full_disk_told
from decant.trainer.run.initial_student import initial_student
from decant.trainer.run.loop import TrainingLoop
from decant.trainer.run.loss_inputs import (
    partners_of,
    principal_directions,
    resolve_layers,
    sketch_inputs,
    tail_prior,
    with_tail,
)
from decant.trainer.run.metrics_log import Callback, MetricsLog, Place
from decant.trainer.run.processes import (
    SilentMetrics,
    first_then_others,
    is_first_process,
    join_processes,
)
from decant.trainer.run.rollout_writers import about_writers
from decant.trainer.run.saved_initial import INITIAL
from decant.trainer.run.speed import Clock, peak_flops, update_flops
from decant.trainer.run.student_parameters import graph_and_all_parameters
from decant.trainer.run.trackers import check_trackers, trackers
from decant.trainer.run.trained import Trained
from decant.trainer.update.step import TrainState, initial_state, make_train_step


def train(
    config: Train, *, callbacks: Sequence[Callback] = (), place: Place | None = None
) -> Trained:
    """Train a student, or continue its run from the newest checkpoint; see `Train`.

    Each of `callbacks` is called with the metrics of every line, after it was written, in the first
    process only. An exception that it raises ends the run. `place` is the run's place in a sweep,
    for its lines.
    Raises ValueError for settings that do not fit the caches, the devices or the run; OSError that
    says what is safe if the disk is full.
    """
    with full_disk_told(config.run):
        return _train(config, callbacks, place)


def _train(config: Train, callbacks: Sequence[Callback], place: Place | None) -> Trained:
    join_processes(config.distributed)
    if config.compilation_cache:
        keep_compiled_programs(config.run)
    cache = cache_at_start(open_for(config.data, config.cache), run=config.run)
    steps = number_of_updates(cache, config=config.data)
    mesh = student_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    _check_batch(config, steps=steps, row_shards=row_shard_count(mesh))
    check_targets(cache, loss=config.loss)
    _check_judging(config, cache)
    about_adapter = check_adapter(config.student, cache=cache, run=config.run)
    others = open_others(config.data)
    config, about_tail = with_tail(config, cache=cache, others=others)
    check_targets(cache, loss=config.loss)
    config, pairs = resolve_layers(config, cache=cache)
    check_mixture(cache, others, loss=config.loss, pairs=pairs)
    tables = Tables(
        prior=tail_prior(cache, loss=config.loss, mesh=mesh, others=caches_with_targets(others)),
        sketch=sketch_inputs([cache, *caches_with_targets(others)], loss=config.loss, mesh=mesh),
        partners=partners_of([cache, *caches_with_targets(others)], loss=config.loss, mesh=mesh),
        directions=principal_directions(cache, pairs=pairs, mesh=mesh),
    )
    binding, student, projections = first_then_others(
        lambda: _begin(config, cache=cache, others=others, steps=steps, pairs=pairs, mesh=mesh)
    )
    graph, state, frozen = _first_state(student, projections, config=config.optimiser, mesh=mesh)
    tables = tables._replace(frozen=frozen or None)
    flops = update_flops(
        student.config,
        rows=config.data.batch_rows,
        length=cache.manifest.sequence_length,
        frozen=bool(frozen),
    )
    about_rollouts = about_writers([cache, *others], loss=config.loss, first=student)
    del student
    objective = Objective(
        graph,
        config.loss,
        vocabulary=cache.manifest.vocabulary_size,
        pairs=pairs,
        execution=Execution(mesh, config.remat),
    )
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(config.run, keep=config.keep)
        stack.callback(checkpoints.close)
        batches = Batches(
            cache,
            config=config.data,
            others=others,
            signals=pairs.signals,
            targets=loss_targets(config.loss.tail, config.loss.divergence),
            here=local_rows(mesh, config.data.batch_rows),
        )
        stack.callback(batches.close)
        if checkpoints.latest is not None:
            state, saved = checkpoints.restore(state)
            binding.require_same(saved.get("binding"), where=f"{config.run}, its checkpoint")
            batches.restore(saved, allows=binding.allows)
        else:
            for weights in (state.params, frozen):
                require_finite(summarise(weights), where=f"{config.run / INITIAL}")
        metrics = cast(MetricsLog, SilentMetrics())
        if is_first_process():
            tracked = trackers(
                config.log, run=config.run, settings=binding.values, quiet=config.quiet
            )
            metrics = MetricsLog(
                config.run,
                after=checkpoints.latest,
                steps=steps,
                quiet=config.quiet,
                place=place,
                callbacks=(*stack.enter_context(tracked), *callbacks),
            )
        stack.callback(metrics.close)
        for notice in filter(
            None, (unused_accelerator(), about_tail, about_rollouts, about_adapter)
        ):
            metrics.say(notice)
        loop = TrainingLoop(
            config=config,
            steps=steps,
            signals=pairs.signals,
            batches=batches,
            checkpoints=checkpoints,
            binding=binding,
            metrics=metrics,
            mesh=mesh,
            step=make_train_step(
                objective,
                optimiser=config.optimiser,
                steps=steps,
                microbatches=config.data.microbatches,
                tables=tables,
                places=jax.tree.map(lambda x: x.sharding, state),
            ),
            # A copy with open files of its own, because a thread reads ahead in the cache above.
            evaluator=_evaluator(objective, config, cache=copy.copy(cache), frozen=frozen)
            if config.heldout_rows != 0
            else None,
            clock=Clock(flops=flops, peak=peak_flops(mesh.devices.ravel().tolist())),
        )
        state = loop.run(state, stopping=stack.enter_context(_stop_signals()))
        return Trained(config.run, int(state.step), steps)


def _check_batch(config: Train, *, steps: int, row_shards: int) -> None:
    """Raise ValueError unless a batch divides into microbatches and shards, and rows fill one."""
    rows, microbatches = config.data.batch_rows, config.data.microbatches
    if rows % (microbatches * row_shards):
        raise ValueError(
            f"data.batch_rows = {rows} does not divide into {microbatches} microbatches on "
            f"{row_shards} devices (mesh.data · mesh.fsdp); choose a multiple of "
            f"{microbatches * row_shards}"
        )
    if steps < 1:
        raise ValueError(f"{config.cache}: its train rows do not fill one batch of {rows} rows")


def _check_judging(config: Train, cache: Cache) -> None:
    """Raise ValueError if held-out rows are asked for that the cache lacks, or needed and not asked
    for."""
    if config.heldout_rows != 0:
        heldout_rows(cache, config.heldout_rows)
    elif config.keep.best:
        raise ValueError(
            f"keep.best = {config.keep.best} keeps the checkpoints that judge best, but "
            "heldout_rows = 0 trains without judging; set heldout_rows, or leave keep.best out"
        )


def _begin(
    config: Train,
    *,
    cache: Cache,
    others: Sequence[Cache],
    steps: int,
    pairs: Pairs,
    mesh: Mesh,
) -> tuple[Binding, Decoder, dict[str, np.ndarray]]:
    """The run's binding, first student and projections, each written to or read from its directory.

    Raises ValueError if the directory belongs to a run with other settings or data.
    """
    if is_first_process():
        check_trackers(config.log)
    config.run.mkdir(parents=True, exist_ok=True)
    latest = latest_step(config.run)
    if not latest and is_first_process() and not (config.run / INITIAL).is_dir():
        # Of a run whose first student could not be made: the mended settings may take its place.
        (config.run / BINDING).unlink(missing_ok=True)
    binding = bind(
        config,
        cache=cache,
        others=others,
        steps=steps,
        signals=(*tail_signals(config.loss.tail), *pairs.signals),
        after=latest,
    )
    if is_first_process():
        read = (*tail_signals(config.loss.tail), *pairs.signals)
        write_data_facts(config.run, (cache, *others), signals=read)
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
    return binding, student, projections


def _first_state(
    model: Decoder, projections: dict[str, np.ndarray], *, config: Optimiser, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState, Parameters]:
    """The model's graph, the state before the first update, and what is frozen; on the mesh."""
    graph, params = graph_and_all_parameters(model, projections, mesh=mesh)
    trained, frozen = trained_and_frozen(params)
    return graph, initial_state(trained, config=config, mesh=mesh), frozen


def _evaluator(
    objective: Objective, config: Train, *, cache: Cache, frozen: Parameters
) -> Evaluator:
    """The held-out metrics of trained parameters, with the frozen ones."""
    evaluate = make_evaluator(
        objective,
        cache=cache,
        rows=config.heldout_rows,
        batch_rows=config.data.batch_rows // config.data.microbatches,
    )
    return lambda trained: evaluate(joined(trained, frozen))


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list to which the first SIGINT or SIGTERM is appended; the next one acts as usual.

    Outside the main thread, where Python lets nobody set a handler, signals stay as they are.
    """
    stopping: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
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
