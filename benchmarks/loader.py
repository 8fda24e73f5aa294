"""Tokens a second that the trainer's loader delivers, against those that an update consumes.

    python -m benchmarks.loader CACHE [--layers 8] [--rows 2] [--dtype float32]

The loader reads shuffled rows, one read a batch, of targets only what the loss needs, and leaves
arrays encoded. The update is the
trainer's compiled step on a batch that is already on the device. The student has the teacher's
shape with fewer blocks and random weights, and learns from the same signals. Loader and update are
measured alternately, for each set of signals.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from decant.models.checkpoints.cut import evenly_spaced
from decant.models.mesh.sharding import student_mesh
from decant.schemas import Cache, open_cache
from decant.schemas.reading.held import held_by, loss_targets
from decant.schemas.signals import AttentionSignal, HiddenSignal
from decant.trainer.config import AttentionLoss, Data, HiddenLoss, Loss, Optimiser
from decant.trainer.data.batches import Batches
from decant.trainer.loss.batch_fields import to_device
from decant.trainer.loss.choice import choose_tail
from decant.trainer.loss.layer_pairs import layer_pairs, number_layers
from decant.trainer.loss.objective import Objective, Tables
from decant.trainer.run.freed_memory import keep_freed_memory
from decant.trainer.run.initial_student import teacher_config
from decant.trainer.run.loss_inputs import principal_directions, sketch_inputs, tail_prior
from decant.trainer.run.student_parameters import graph_and_parameters
from decant.trainer.update.step import initial_state, make_train_step
from tests.making.models import random_decoder


def main():
    options = _arguments()
    keep_freed_memory()  # as `decant train` does
    cache = open_cache(options.cache)
    table = Table(
        title=f"{options.layers} layers, {options.rows} rows of {cache.manifest.sequence_length}, "
        f"{options.dtype}, {jax.devices()[0].device_kind}"
    )
    for column in ("signals", "loader, tokens/s", "update, tokens/s", "loader ÷ update"):
        table.add_column(column, justify="left" if column == "signals" else "right")
    for name, loss in _losses(cache).items():
        loader, update = measure(cache, loss, options)
        table.add_row(name, f"{loader:,.0f}", f"{update:,.0f}", f"{loader / update:.1f}")
    Console().print(table)


def measure(cache: Cache, loss: Loss, options) -> tuple[float, float]:
    """Median tokens a second, of the loader and of the update."""
    mesh, teacher = student_mesh(), teacher_config(cache)
    layers = evenly_spaced(options.layers, teacher.num_layers)
    shape = teacher.with_layers(layers)
    loss = number_layers(loss, cache=cache, teacher=teacher, student=shape, cut_from=layers)
    pairs = layer_pairs(loss, cache=cache, student=shape)
    config = Data(batch_rows=options.rows)
    graph, params = graph_and_parameters(
        random_decoder(shape, scale=0.02, dtype=np.dtype(options.dtype))
    )
    step = make_train_step(
        Objective(graph, loss, vocabulary=cache.manifest.vocabulary_size, pairs=pairs),
        optimiser=Optimiser(),
        steps=10**6,
        tables=Tables(
            prior=tail_prior(cache, loss=loss, mesh=mesh),
            sketch=sketch_inputs([cache], loss=loss, mesh=mesh),
            directions=principal_directions(cache, pairs=pairs, mesh=mesh),
        ),
    )
    batches = Batches(cache, config=config, signals=pairs.signals, targets=loss_targets(loss.tail))
    batch = to_device(batches.next(), mesh=mesh, tail=loss.tail, signals=pairs.signals)
    state, _ = jax.block_until_ready(step(initial_state(params, config=Optimiser()), batch))
    tokens, loaded, updated = batch["tokens"].size, [], []
    for _ in range(options.rounds):
        for _ in range(4):  # batches that were prefetched during the update
            batches.next()
        start = time.perf_counter()
        for _ in range(options.batches):
            batches.next()
        loaded.append(options.batches * tokens / (time.perf_counter() - start))
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        updated.append(tokens / (time.perf_counter() - start))
    batches.close()
    return statistics.median(loaded), statistics.median(updated)


def _losses(cache: Cache) -> dict[str, Loss]:
    """Losses by what they read, for what the cache holds: T = 1 and 4, and terms at T = 1."""
    held = cache.manifest.signals.values()
    at = {t: choose_tail(Loss(temperature=t), held_by([cache]))[0] for t in (1.0, 4.0)}
    logits, terms = at[1.0], {}
    if any(isinstance(signal, HiddenSignal) for signal in held):
        terms["hidden"] = (HiddenLoss(),)
    if any(isinstance(signal, AttentionSignal) for signal in held):
        terms["attention"] = (AttentionLoss(),)
    every = {f"logits, {loss.tail} (T = {t:g})": loss for t, loss in at.items()}
    for name, term in terms.items():
        every[f"logits, {name}"] = dataclasses.replace(logits, **{name: term})
    return every | ({"all": dataclasses.replace(logits, **terms)} if len(terms) == 2 else {})


def _arguments():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", nargs="?", default="runs/cache")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=16, help="batches to read in a round")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
