"""Speed of training from a cache, against the bare update and against a teacher in the loop.

    python -m benchmarks.training [--cache runs/cache] [--layers 8] [--dtype float32]
        [--hidden] [--attention]   also learn from the last hidden states, from all stored maps
        [--no-teacher]             only the first two of the three

Measured alternately, with the same student and batch size:
- `bare step`: the compiled update on one batch that is already on the device;
- `trainer`: the training loop, with reading, decoding, moving and logging;
- `teacher in the loop`: the bare step after a forward pass of the teacher over the batch, of which
  only each position's largest logit is kept. The online loss on these logits is left out, so this
  is a lower bound of the cost of online distillation.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from decant.models import open_checkpoint
from decant.models.checkpoints.cut import cut_layers, evenly_spaced
from decant.models.mesh.sharding import teacher_mesh
from decant.models.numerics import logits
from decant.schemas import open_cache
from decant.trainer.config import AttentionLoss, Data, HiddenLoss, Loss, Train
from decant.trainer.data.batches import Batches
from decant.trainer.loss.batch_fields import to_device
from decant.trainer.loss.layer_pairs import layer_pairs, number_layers
from decant.trainer.loss.objective import Objective, Tables
from decant.trainer.loss.position_chunks import tokens_at_once
from decant.trainer.run.binding import Binding
from decant.trainer.run.checkpoint import Checkpoints
from decant.trainer.run.loop import TrainingLoop
from decant.trainer.run.loss_inputs import principal_directions
from decant.trainer.run.metrics_log import MetricsLog
from decant.trainer.run.student_parameters import graph_and_parameters
from decant.trainer.update.step import initial_state, make_train_step


def main():
    options = _arguments()
    cache, mesh = open_cache(options.cache), teacher_mesh()
    never = 10**9
    source = open_checkpoint(options.teacher)
    teacher = source.load(dtype=options.dtype)
    layers = evenly_spaced(options.layers, source.config.num_layers)
    student = cut_layers(source, layers, dtype=options.dtype)
    loss = Loss(
        tail="sampled" if cache.manifest.logits.draws else "bucket",
        hidden=(HiddenLoss(),) if options.hidden else (),
        attention=(AttentionLoss(),) if options.attention else (),
    )
    config = Train(
        cache=options.cache,
        data=Data(batch_rows=options.rows),
        loss=number_layers(
            loss, cache=cache, teacher=source.config, student=student.config, cut_from=layers
        ),
        dtype=options.dtype,
        evaluate_every=never,
        checkpoint_every=never,
    )
    pairs = layer_pairs(config.loss, cache=cache, student=student.config)
    graph, params = graph_and_parameters(student)
    step = make_train_step(
        Objective(graph, config.loss, vocabulary=cache.manifest.vocabulary_size, pairs=pairs),
        optimiser=config.optimiser,
        steps=never,
        tables=Tables(directions=principal_directions(cache, pairs=pairs, mesh=mesh)),
    )
    batches = Batches(cache, config=config.data, signals=pairs.signals)
    fixed = to_device(batches.next(), mesh=mesh, tail=config.loss.tail, signals=pairs.signals)
    at_once = tokens_at_once(None, vocabulary=cache.manifest.vocabulary_size)
    ask = make_teacher(teacher, chunk_tokens=at_once)

    with loop(config, batches, step, mesh=mesh, signals=pairs.signals) as whole:

        def bare(state):
            for _ in range(options.updates):
                state, _ = step(state, fixed)
            return jax.block_until_ready(state)

        def online(state):
            for _ in range(options.updates):
                jax.block_until_ready(ask(fixed))
                state, _ = step(state, fixed)
            return jax.block_until_ready(state)

        kinds = {"bare step": bare, "trainer": partial(whole, updates=options.updates)}
        if options.with_teacher:
            kinds["teacher in the loop"] = online
            jax.block_until_ready(ask(fixed))
        state, _ = step(initial_state(params, config=config.optimiser), fixed)  # compiles
        times = {name: [] for name in kinds}
        for _ in range(options.rounds):
            for name, run in kinds.items():
                start = time.perf_counter()
                state = run(state)
                times[name].append((time.perf_counter() - start) / options.updates)
    batches.close()
    _print(times, tokens=fixed["tokens"].size, options=options)


@contextlib.contextmanager
def loop(config, batches, step, *, mesh, signals=()):
    """The training loop as a function of a state and `updates`; it neither evaluates nor saves."""
    with tempfile.TemporaryDirectory() as directory:
        metrics = MetricsLog(Path(directory), after=None, steps=10**9, quiet=config.quiet)
        training = TrainingLoop(
            config=config,
            steps=0,
            signals=signals,
            batches=batches,
            checkpoints=Unsaved(Path(directory)),
            binding=Binding({}),
            metrics=metrics,
            mesh=mesh,
            step=step,
            evaluator=lambda _: dict.fromkeys(HELDOUT, 0.0),
        )

        def run(state, *, updates):
            until = int(state.step) + updates
            return jax.block_until_ready(dataclasses.replace(training, steps=until).run(state))

        yield run
        metrics.close()


HELDOUT = ("heldout_kl_bound", "heldout_ce", "heldout_perplexity", "heldout_agreement")


class Unsaved(Checkpoints):
    """Checkpoints that are not saved, so that saving is not measured."""

    def save(self, state, *, data, heldout=None):
        """Do nothing."""


def make_teacher(teacher, *, chunk_tokens):
    """A function from a batch to the teacher's largest logit at each position."""
    graph, params = graph_and_parameters(teacher)

    @jax.jit
    def ask(params, batch):
        model = nnx.merge(graph, params)
        hidden, _ = model(batch["tokens"], batch["segment_ids"], batch["positions"])
        matrix = model.unembedding()
        chunks = hidden.reshape(-1, chunk_tokens, hidden.shape[-1])
        head = partial(logits, unembedding=matrix, softcap=model.config.final_softcap)
        return jax.lax.map(lambda chunk: jnp.max(head(chunk), axis=-1), chunks)

    return lambda batch: ask(params, batch)


def _print(times, *, tokens, options):
    table = Table(
        title=f"{options.layers} layers, {options.rows} rows an update, {options.dtype}, "
        f"{jax.devices()[0].device_kind}"
    )
    for column in ("update", "ms", "tokens/s", "speed ÷ bare step", "least", "most"):
        table.add_column(column, justify="left" if column == "update" else "right")
    for name, measured in times.items():
        pairs = zip(times["bare step"], measured, strict=True)
        ratios = [bare / other for bare, other in pairs]
        median = statistics.median(measured)
        of_bare = (f"{of(ratios):.3f}" for of in (statistics.median, min, max))
        table.add_row(name, f"{1e3 * median:.0f}", f"{tokens / median:,.0f}", *of_bare)
    Console().print(table)


def _arguments():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    for term in ("hidden", "attention"):
        parser.add_argument(f"--{term}", action="store_true", help=f"with [[loss.{term}]]")
    parser.add_argument("--teacher", default="embedded", help="the cache's teacher")
    parser.add_argument("--no-teacher", dest="with_teacher", action="store_false")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--updates", type=int, default=6, help="updates in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
