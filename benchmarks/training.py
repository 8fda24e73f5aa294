"""What training from a cache costs: against the bare step, and against a teacher in the loop.

    python -m benchmarks.training [--cache runs/cache] [--layers 8] [--dtype float32]
        [--hidden] [--attention]   learn from the last hidden states, all stored maps too
        [--no-teacher]             only the first two of the three

Interleaved in one run, all with the same student and batch size:
- `bare step`: the compiled update on one batch that is on the device already;
- `trainer`: the training loop itself, with reading, decoding, moving and logging;
- `teacher in the loop`: the bare step after the teacher's forward pass on the batch, through its
  head in chunks, of which only the largest logit is kept. What online distillation does with the
  logits besides (its loss) is left out, so this is the least that it could cost.
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
from decant.trainer.run.binding import Bound
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
    compared = layer_pairs(config.loss, cache=cache, student=student.config)
    graph, params = graph_and_parameters(student)
    step = make_train_step(
        Objective(graph, config.loss, vocabulary=cache.manifest.vocabulary_size, pairs=compared),
        optimiser=config.optimiser,
        steps=never,
        tables=Tables(directions=principal_directions(cache, pairs=compared, mesh=mesh)),
    )
    batches = Batches(cache, config=config.data, signals=compared.signals)
    fixed = to_device(batches.next(), mesh=mesh, tail=config.loss.tail, signals=compared.signals)
    at_once = tokens_at_once(None, vocabulary=cache.manifest.vocabulary_size)
    ask = make_teacher(teacher, chunk_tokens=at_once)

    with loop(config, batches, step, mesh=mesh, signals=compared.signals) as whole:

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
    """The trainer's loop as a function of state and `updates`, which neither judges nor saves."""
    with tempfile.TemporaryDirectory() as directory:
        metrics = MetricsLog(Path(directory), after=None, steps=10**9, quiet=config.quiet)
        training = TrainingLoop(
            config=config,
            steps=0,
            signals=signals,
            batches=batches,
            checkpoints=Unsaved(Path(directory)),
            bound=Bound({}),
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
    """Saves nothing: a checkpoint is not part of what is measured."""

    def save(self, state, *, data, heldout=None):
        """Nothing."""


def make_teacher(teacher, *, chunk_tokens):
    """The teacher's forward pass through its head; each position's largest logit."""
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
    parser.add_argument("--teacher", default="embedded", help="what the cache was captured from")
    parser.add_argument("--no-teacher", dest="with_teacher", action="store_false")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--updates", type=int, default=6, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
