"""Speed of students of real sizes: learning from a cache, hard labels, or a teacher in the loop.

    python -m benchmarks.students CACHE [--student 125m] [--teacher 1b] [--rows 32] [--chunk 256]

For accelerators. Models have well-known shapes, the cache's vocabulary and random weights (speed
does not depend on weights). They compute in bfloat16; the student's weights are float32. Measured
alternately:
- `hard labels`: the compiled update with the fused cross-entropy of benchmarks.head as its head,
  on one batch that is already on the device;
- `cached targets`: the trainer's update on the same batch;
- `trainer`: the training loop, with reading, decoding, moving and logging;
- `teacher in the loop`: `cached targets` after a forward pass of the teacher over the batch, of
  which only each position's largest logit is kept: a lower bound of the cost of online learning.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.training import loop, make_teacher
from benchmarks.update import hard_labels
from decant.models import Decoder, ModelConfig
from decant.models.mesh.execution import Execution
from decant.models.mesh.sharding import student_mesh
from decant.schemas import open_cache
from decant.trainer.config import Data, Loss, Train
from decant.trainer.data.batches import Batches
from decant.trainer.loss import objective as objective_module
from decant.trainer.loss.batch_fields import to_device
from decant.trainer.loss.objective import Objective, Tables
from decant.trainer.loss.position_chunks import tokens_at_once
from decant.trainer.run.loss_inputs import tail_prior
from decant.trainer.run.speed import multiplying_parameters, peak_flops, update_flops
from decant.trainer.run.student_parameters import graph_and_parameters
from decant.trainer.update.step import initial_state, make_train_step

SHAPES = {
    # hidden, MLP, blocks, heads, heads of keys, head's width, tied
    "tiny": (64, 128, 2, 4, 2, 16, True),
    "125m": (576, 1536, 30, 9, 3, 64, True),  # SmolLM2-135M
    "1b": (2048, 8192, 16, 32, 8, 64, True),  # Llama 3.2 1B
    "8b": (4096, 14336, 32, 32, 8, 128, False),  # Llama 3.1 8B
}
HARD, CACHED, TRAINER, ONLINE = "hard labels", "cached targets", "trainer", "teacher in the loop"
NEVER = 10**9


def main():
    options = _arguments()
    cache, mesh = open_cache(options.cache), student_mesh()
    vocabulary = cache.manifest.vocabulary_size
    chunk = chunk_tokens(cache, options)
    config = Train(
        cache=options.cache,
        data=Data(batch_rows=options.rows),
        loss=Loss(tail=options.tail, chunk_tokens=chunk),
        dtype="bfloat16",
        remat=options.remat,
        evaluate_every=NEVER,
        checkpoint_every=NEVER,
        quiet=True,
    )
    shape = model_config(options.student, cache)
    graph, params = graph_and_parameters(decoder(shape, param_dtype="float32"))
    prior = tail_prior(cache, loss=config.loss, mesh=mesh)
    batches = Batches(cache, config=config.data)
    batch = to_device(batches.next(), mesh=mesh, tail=config.loss.tail)
    state = initial_state(params, config=config.optimiser)

    def compiled(head=None):
        step = make_train_step(
            Objective(
                graph, config.loss, vocabulary=vocabulary, execution=Execution(mesh, config.remat)
            ),
            optimiser=config.optimiser,
            steps=NEVER,
            tables=Tables(prior=prior),
        )
        with mock.patch.object(
            objective_module, "distillation_loss", head or objective_module.distillation_loss
        ):
            program = step.lower(state, batch).compile()
        return lambda state, batch: program(state, batch, step.tables)

    cached, hard = compiled(), compiled(hard_labels)
    kinds = {HARD: repeated(hard, batch, options), CACHED: repeated(cached, batch, options)}
    with loop(config, batches, cached, mesh=mesh) as whole:
        kinds[TRAINER] = partial(whole, updates=options.updates)
        if options.teacher:
            teacher = decoder(model_config(options.teacher, cache), param_dtype="bfloat16")
            ask = make_teacher(teacher, chunk_tokens=chunk)
            kinds[ONLINE] = repeated(cached, batch, options, before=lambda: ask(batch))
        times = {name: [] for name in kinds}
        for round_ in range(options.rounds + 1):
            for name, run in kinds.items():
                start = time.perf_counter()
                state = run(state)
                if round_:  # The first round compiles and warms up.
                    times[name].append((time.perf_counter() - start) / options.updates)
    alone = loader_alone(batches, options)
    batches.close()
    show(times, shape, options, length=cache.manifest.sequence_length, loader=alone)


def decoder(shape: ModelConfig, *, param_dtype: str) -> Decoder:
    """A decoder with random weights, made on the device."""
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.dtype(param_dtype)}
    return nnx.jit(lambda: Decoder(shape, rngs=nnx.Rngs(0), **dtypes))()


def chunk_tokens(cache, options) -> int:
    """The trainer's choice, reduced so that chunks divide a row, as benchmarks.head needs."""
    most = tokens_at_once(options.chunk, vocabulary=cache.manifest.vocabulary_size)
    length = cache.manifest.sequence_length
    fitting = range(1, max(1, most // options.rows) + 1)
    return options.rows * max(n for n in fitting if length % n == 0)


def model_config(name: str, cache) -> ModelConfig:
    hidden, mlp, layers, heads, kv_heads, head_dim, tied = SHAPES[name]
    return ModelConfig(
        vocab_size=cache.manifest.vocabulary_size,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        tie_embeddings=tied,
        max_positions=cache.manifest.sequence_length,
    )


def repeated(step, batch, options, *, before=lambda: None):
    """A function that runs updates on one batch and waits once, after the last."""

    def run(state):
        for _ in range(options.updates):
            before()
            state, _ = step(state, batch)
        return jax.block_until_ready(state)

    return run


def loader_alone(batches: Batches, options) -> float:
    """Seconds a batch of the loader when nothing else runs."""
    for _ in range(4):  # prefetched batches
        batches.next()
    start = time.perf_counter()
    for _ in range(options.updates):
        batches.next()
    return (time.perf_counter() - start) / options.updates


def show(times, shape, options, *, length, loader):
    flops = update_flops(shape, rows=options.rows, length=length)
    peak, tokens = peak_flops(), options.rows * length
    size = multiplying_parameters(shape) / 1e6
    table = Table(
        title=f"{options.student} ({size:,.0f}M), teacher {options.teacher}, {options.rows} × "
        f"{length} tokens, {options.tail}, remat {options.remat}, "
        f"{jax.devices()[0].device_kind}"
    )
    for column in ("update", "ms", "tokens/s", "MFU", "speed ÷ hard labels"):
        table.add_column(column, justify="left" if column == "update" else "right")
    for name, measured in times.items():
        seconds = statistics.median(measured)
        of_hard = statistics.median(h / s for h, s in zip(times[HARD], measured, strict=True))
        mfu = f"{flops / seconds / peak:.1%}" if peak else "–"
        rate = f"{tokens / seconds:,.0f}"
        table.add_row(name, f"{1e3 * seconds:.1f}", rate, mfu, f"{of_hard:.3f}")
    table.add_row("(loader alone)", f"{1e3 * loader:.1f}", f"{tokens / loader:,.0f}", "", "")
    Console(width=120).print(table)


def _arguments():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", type=Path, nargs="?", default=Path("runs/cache"))
    parser.add_argument("--student", default="125m", choices=SHAPES)
    parser.add_argument("--teacher", choices=SHAPES)
    parser.add_argument("--tail", default="sampled")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--chunk", type=int, help="loss.chunk_tokens; default: by device")
    parser.add_argument("--remat", default="none", choices=["none", "dots", "block"])
    parser.add_argument("--updates", type=int, default=10, help="updates in a round")
    parser.add_argument("--rounds", type=int, default=4)
    return parser.parse_args()


if __name__ == "__main__":
    main()
