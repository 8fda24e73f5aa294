"""Time and memory of an update with a teacher's targets, against one with hard labels only.

    python -m benchmarks.update [--vocabulary 49152] [--k 64] [--width 576] [--layers 8]

Both are the trainer's compiled update of the same student on random rows. `hard labels only` has
the fused cross-entropy of benchmarks.head as its head. Updates are timed alternately. Memory is
that of the compiled program's temporaries on a device. It is shown also for the dense formula of
online distillation on logits of the whole batch, and for rematerialisation. The dense formula
computes the teacher's logits from its states; the teacher's forward pass and weights are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.head import fused_cross_entropy
from decant.models import Decoder, ModelConfig
from decant.models.mesh.execution import Execution
from decant.models.numerics import contract
from decant.trainer.config import Loss, Optimiser
from decant.trainer.loss import objective as objective_module
from decant.trainer.loss.chunk_loss import HeadSums
from decant.trainer.loss.objective import Objective, Tables
from decant.trainer.run.student_parameters import graph_and_parameters
from decant.trainer.update.step import initial_state, make_train_step
from tests.making.models import random_decoder

NODES, DRAWS = 7, 16
HARD = "hard labels only"


def main():
    options = _arguments()
    config = ModelConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=8 * options.width // 3 // 64 * 64,
        num_layers=options.layers,
        num_heads=options.width // 64,
        num_kv_heads=options.width // 192 or 1,
        head_dim=64,
        tie_embeddings=True,
        max_positions=options.length,
    )
    model = random_decoder(config, scale=0.02, dtype=jnp.dtype(options.dtype))
    batch, prior, teacher = _inputs(options)
    kinds = {
        HARD: (Loss(tail="bucket", alpha=0.0), hard_labels),
        **{tail: (Loss(tail=tail), None) for tail in ("bucket", "prior", "sampled")},
    }
    lowered = {
        name: lower(model, batch, loss, options, head=head, prior=prior)
        for name, (loss, head) in kinds.items()
    }
    if not options.memory_only:
        print_times(time_updates(lowered, model, options), options)
    if options.times_only:
        return
    heads = {
        **{name: memory(program) for name, program in lowered.items() if name != "sampled"},
        "dense online formula": memory(
            lower(model, batch, Loss(tail="bucket"), options, head=dense_online(teacher))
        ),
    }
    for remat in ("dots", "block"):
        loss = Loss(tail="prior")
        program = lower(model, batch, loss, options, prior=prior, remat=remat)
        heads[f"prior, remat = {remat}"] = memory(program)
    print_memory(heads, options)


def lower(model: Decoder, batch, loss, options, *, head=None, prior=None, remat="none"):
    """The compiled update, its batch, and its tables."""
    graph, params = graph_and_parameters(model)
    step = make_train_step(
        Objective(
            graph,
            dataclasses.replace(loss, chunk_tokens=options.chunk),
            vocabulary=options.vocabulary,
            execution=Execution(remat=remat),
        ),
        optimiser=Optimiser(),
        steps=1000,
        tables=Tables(prior=prior if loss.tail == "prior" else None),
    )
    needed = batch if loss.tail == "sampled" else {k: v for k, v in batch.items() if k not in DRAWN}
    state = jax.eval_shape(lambda: initial_state(params, config=Optimiser()))
    with mock.patch.object(
        objective_module, "distillation_loss", head or objective_module.distillation_loss
    ):
        return step.lower(state, needed).compile(), needed, step.tables


DRAWN = ("tail_ids", "tail_logprobs", "tail_logweights")


def hard_labels(hidden, unembedding, targets, *, recipe, vocabulary, **_):
    """A replacement of the trainer's head: cross-entropy, with the same chunks."""
    value = fused_cross_entropy(
        hidden, unembedding[:, :vocabulary], targets, chunk=recipe.chunk_tokens
    )
    return value, _only(value, targets)


def dense_online(teacher):
    """A replacement of the trainer's head: the online loss from the logits of both models."""
    states, matrix = teacher

    def head(hidden, unembedding, targets, *, temperature, alpha, **_):
        ours = contract("btd,dv->btv", hidden, unembedding)
        theirs = contract("btd,dv->btv", states, matrix)
        logp = jax.nn.log_softmax(theirs / temperature)
        logq = jax.nn.log_softmax(ours / temperature)
        kl = jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)
        logits = jax.nn.log_softmax(ours)
        ce = -jnp.take_along_axis(logits, targets.labels[..., None], axis=-1)[..., 0]
        value = jnp.sum(targets.mask * (alpha * temperature**2 * kl + (1 - alpha) * ce))
        return value, _only(value, targets)

    return head


def _only(value, targets):
    count = jnp.sum(targets.mask.astype(jnp.float32))
    return HeadSums.zero()._replace(ce=value, ce_taught=value, count=count, taught=count)


def time_updates(lowered, model, options):
    """Seconds of each update, run alternately; each program continues from the last one's state."""
    _, params = graph_and_parameters(model)
    state = initial_state(params, config=Optimiser())
    times = {name: [] for name in lowered}
    for round_ in range(options.repeats + 1):
        for name, (program, needed, tables) in lowered.items():
            start = time.perf_counter()
            state, _ = jax.block_until_ready(program(state, needed, tables))
            if round_:  # The first round warms up.
                times[name].append(time.perf_counter() - start)
    return times


def memory(lowered) -> int:
    """Bytes of the program's temporaries."""
    return lowered[0].memory_analysis().temp_size_in_bytes


def print_times(times, options):
    table = Table(title=_title(options))
    for column in ("update", "ms", "÷ hard labels only"):
        table.add_column(column, justify="left" if column == "update" else "right")
    for name, measured in times.items():
        ratios = [a / b for a, b in zip(measured, times[HARD], strict=True)]
        ratio = f"{statistics.median(ratios):.3f}"
        table.add_row(name, f"{1e3 * statistics.median(measured):.0f}", ratio)
    Console().print(table)


def print_memory(sizes, options):
    table = Table(title=f"temporaries of an update: {_title(options)}")
    for column in ("update", "MiB", "÷ dense"):
        table.add_column(column, justify="left" if column == "update" else "right")
    for name, size in sizes.items():
        share = size / sizes["dense online formula"]
        table.add_row(name, f"{size / 2**20:,.0f}", f"{share:.2f}")
    Console().print(table)


def _title(options) -> str:
    return (
        f"{options.layers} layers, D={options.width}, V={options.vocabulary}, k={options.k}, "
        f"{options.rows} × {options.length} tokens, {options.dtype}, {jax.devices()[0].device_kind}"
    )


def _inputs(options):
    rng = np.random.default_rng(0)
    shape, vocabulary = (options.rows, options.length), options.vocabulary
    several = options.k + DRAWS
    # The ids of a position are distinct and far apart, as real ones are.
    ids = rng.integers(0, vocabulary, (*shape, 1)) + np.arange(several) * (vocabulary // several)
    ids = (ids % vocabulary).astype(np.int32)
    logprobs = -np.sort(rng.exponential(3, (*shape, options.k)), -1) - 2
    mass = np.linspace(np.log(vocabulary - options.k), -1, NODES)
    arrays = {
        "tokens": rng.integers(0, vocabulary, shape).astype(np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(options.length, dtype=np.int32), shape),
        "loss_mask": np.ones(shape, bool),
        "topk_ids": ids[..., : options.k],
        "topk_logprobs": logprobs.astype(np.float32),
        "tail_logmass": np.broadcast_to(mass, (*shape, NODES)).astype(np.float32),
        "tail_ids": ids[..., options.k :],
        "tail_logprobs": np.full((*shape, DRAWS), -12.0, np.float32),
        "tail_logweights": np.full((*shape, DRAWS), 7.0, np.float32),
    }
    prior = jax.nn.log_softmax(3 * rng.normal(size=(NODES, vocabulary)))
    states = jnp.asarray(rng.normal(size=(*shape, options.width)), options.dtype)
    matrix = jnp.asarray(rng.normal(size=(options.width, vocabulary)) * 0.04, options.dtype)
    batch = {name: jnp.asarray(array) for name, array in arrays.items()}
    return batch, jnp.asarray(prior, jnp.float32), (states, matrix)


def _arguments():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--memory-only", action="store_true", help="compile without running")
    parser.add_argument("--times-only", action="store_true", help="no table of memory")
    return parser.parse_args()


if __name__ == "__main__":
    main()
