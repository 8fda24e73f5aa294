"""The classic online step, from a cache and with the teacher in the loop: both loss curves.

    python -m benchmarks.seed_parity [--work runs/seed-parity] [--teacher embedded]
        [--student embedded]       what the student is cut from; unset: the teacher
        [--files embedded] [--max-bytes 200000] [--sequence-length 256] [--layers 8]
        [--updates 60] [--rows 2] [--temperature 4] [--hidden 0.001] [--attention 1]
        [--cache runs/cache]   a sealed cache with hidden/last and maps; else one is captured
        [--tails default bucket …]

The classic step is T = 4, α = 0.9, hard labels on, and terms on the last hidden states and on
attention maps, scaled as EasyDeL 0.3 scales them. `online` computes the whole distribution, the
states and the maps of the teacher for each batch, and its loss is written out here. The others are
`decant train` from the cache with one setting of `loss.tail` each; `default` leaves it unset. All
begin as the same student and see the same rows in the same order, with the same learning rate.

It prints the curves at some updates, and each student's KL to the dense teacher on held-out rows.
`WORK/curves.csv` has every update: the loss, and its four parts without their weights.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.quality.judge import judge
from benchmarks.quality.teacher import dense_teacher
from decant.models import Decoder, open_checkpoint
from decant.models.mesh.sharding import teacher_mesh
from decant.models.numerics import logits
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Attention, Corpus, Hidden, Precompute, Signals, Teacher
from decant.schemas import Cache, open_cache
from decant.schemas.disk.atomic import replacing
from decant.schemas.reading.held import held_by
from decant.schemas.records.rows import next_tokens
from decant.trainer.config import AttentionLoss, Data, HiddenLoss, Loss, Optimiser, Student, Train
from decant.trainer.data.batches import Batches
from decant.trainer.loss.batch_fields import ROWS
from decant.trainer.loss.choice import choose_tail
from decant.trainer.run.initial_student import initial_student
from decant.trainer.run.loss_inputs import resolve_layers
from decant.trainer.run.metrics_log import read_metrics
from decant.trainer.run.student_parameters import graph_and_parameters
from decant.trainer.run.train import train
from decant.trainer.run.trained_student import load_student
from decant.trainer.update.optimiser import learning_rate
from decant.trainer.update.step import initial_state, updated_state

PARTS = ("kl_loss", "ce_loss", "hidden_state_loss", "attention_loss")
NEVER = 10**6
Curve = list[dict[str, float]]
"""`loss` and `PARTS` of each update."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run all students, print the report and return each one's curve and held-out measures."""
    options = _arguments(arguments)
    cache = open_cache(options.cache) if options.cache else captured(options)
    judged = partial(
        judge,
        cache=cache,
        teacher=dense_teacher(
            options.teacher, cache=cache, dtype=options.dtype, directory=options.work
        ),
        batch_rows=options.rows,
    )
    results = {}
    for name in ("online", *options.tails):
        config = settings(options, cache, name)
        run = online if name == "online" else from_cache
        curve, graph, params = run(config, cache, options)
        results[name] = {"curve": curve, "heldout": judged(graph, params)}
    _report(results, options.work)
    return results


def captured(options: argparse.Namespace) -> Cache:
    """A cache of the corpus with the default targets, the last states and some maps."""
    blocks = open_checkpoint(options.teacher).config.num_layers
    output = options.work / "cache"
    precompute(
        Precompute(
            corpus=Corpus(
                files=tuple(options.files),
                max_bytes=options.max_bytes,
                sequence_length=options.sequence_length,
                heldout=0.2,
            ),
            teacher=Teacher(model=options.teacher, dtype=options.dtype),
            signals=Signals(
                hidden=Hidden(layers=(-1,)),
                attention=Attention(layers=tuple(sorted({0, blocks - 1})), dtype="bfloat16"),
            ),
            output=output,
        )
    )
    return open_cache(output)


def settings(options: argparse.Namespace, cache: Cache, name: str) -> Train:
    """The classic step as settings of `decant train`, with every layer as a number."""
    tail: Any = {} if name in ("default", "online") else {"tail": name}
    loss = Loss(
        temperature=options.temperature,
        alpha=0.9,
        hidden=(HiddenLoss(weight=options.hidden, scale="sum"),) if options.hidden else (),
        attention=(AttentionLoss(weight=options.attention, scale="pairs", normalize=False),)
        if options.attention
        else (),
        **tail,
    )
    loss, _ = choose_tail(loss, held_by([cache]))
    config = Train(
        cache=cache.path,
        run=options.work / name,
        student=Student(source=options.student or options.teacher, layers=options.layers),
        data=Data(batch_rows=options.rows, steps=options.updates),
        loss=loss,
        optimiser=Optimiser(learning_rate=options.learning_rate),
        dtype=options.dtype,
        log_every=1,
        evaluate_every=NEVER,
        checkpoint_every=NEVER,
        heldout_rows=options.rows,
    )
    return resolve_layers(config, cache=cache)[0]


def from_cache(config: Train, cache: Cache, options: argparse.Namespace) -> tuple[Curve, Any, Any]:
    """`decant train`: its curve, and the student's graph and parameters."""
    train(config)
    lines = [line for line in read_metrics(config.run) if "loss" in line]
    curve = [{part: line.get(part, 0.0) for part in ("loss", *PARTS)} for line in lines]
    return curve, *load_student(config.run, dtype=config.dtype)


def online(config: Train, cache: Cache, options: argparse.Namespace) -> tuple[Curve, Any, Any]:
    """The same updates with the teacher in the loop."""
    config.run.mkdir(parents=True, exist_ok=True)
    model = initial_student(
        config.student, cache=cache, run=config.run, dtype=config.dtype, seed=config.data.seed
    )
    graph, params = graph_and_parameters(model)
    state = initial_state(params, config=config.optimiser)
    teacher = open_checkpoint(options.teacher).load(dtype=config.dtype)
    step = _online_step(graph, teacher, config, vocabulary=cache.manifest.vocabulary_size)
    batches, curve = Batches(cache, config=config.data), []
    with jax.set_mesh(teacher_mesh()):
        for _ in range(options.updates):
            batch = batches.next()
            state, metrics = step(state, {name: jnp.asarray(batch[name]) for name in ROWS})
            curve.append({name: float(x) for name, x in metrics.items()})
    batches.close()
    return curve, graph, state.params


def _online_step(
    graph: nnx.GraphDef, teacher: Decoder, config: Train, *, vocabulary: int
) -> Callable[..., Any]:
    rate = learning_rate(config.optimiser, steps=config.data.steps or 0)
    teacher_graph, weights = nnx.split(teacher)

    @partial(jax.jit, donate_argnums=0)
    def step(state, weights, batch):
        loss = partial(
            classic_loss, batch=batch, settings=config.loss, vocabulary=vocabulary, graph=graph
        )
        teacher = nnx.merge(teacher_graph, weights)
        (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(
            state.params, teacher=teacher
        )
        state = updated_state(
            state,
            gradient,
            rate=jnp.float32(rate(state.step + 1)),
            finite=jnp.isfinite(value),
            config=config.optimiser,
        )
        return state, {"loss": value, **parts}

    return lambda state, batch: step(state, weights, batch)


def classic_loss(
    params: Any,
    *,
    graph: nnx.GraphDef,
    teacher: Decoder,
    batch: dict[str, jax.Array],
    settings: Loss,
    vocabulary: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The classic online loss of a batch, and its parts without weights.

    α·T²·KL + (1 − α)·CE + λ·hidden + μ·attention. The first three are means over the tokens that
    count; the hidden term sums over the width. The attention term sums over heads, and divides by
    the pairs of a token that counts and one of its document. Terms are means over their layers.
    """
    student = nnx.merge(graph, params)
    ours, theirs = _layers(settings)
    inputs = (batch["tokens"], batch["segment_ids"], batch["positions"])
    hidden, states = student(*inputs, hidden_layers=ours)
    known, teacher_states = teacher(*inputs, hidden_layers=theirs)
    mask, segments = batch["loss_mask"], batch["segment_ids"]
    tokens = jnp.sum(mask)

    # A row at a time, and again in the backward pass: two whole distributions are large.
    @jax.checkpoint
    def row(arrays):
        hidden, known, labels, mask = arrays
        student_logits = logits(
            hidden, student.unembedding()[:, :vocabulary], softcap=student.config.final_softcap
        )
        teacher_logits = logits(
            known, teacher.unembedding()[:, :vocabulary], softcap=teacher.config.final_softcap
        )
        kl, ce = _kl_and_ce(student_logits, teacher_logits, labels, settings.temperature)
        return jnp.sum(jnp.where(mask, kl, 0)), jnp.sum(jnp.where(mask, ce, 0))

    kl, ce = jax.lax.map(row, (hidden, known, next_tokens(batch["tokens"], xp=jnp), mask))
    parts = {"kl_loss": jnp.sum(kl) / tokens, "ce_loss": jnp.sum(ce) / tokens}
    alpha = settings.first_alpha
    loss = alpha * settings.temperature**2 * parts["kl_loss"] + (1 - alpha) * parts["ce_loss"]

    for term in settings.hidden:
        layers = list(zip(term.student_layers, term.teacher_layers, strict=True))
        squares = sum(jnp.square(states[i] - teacher_states[j]) for i, j in layers) / len(layers)
        parts["hidden_state_loss"] = jnp.sum(squares * mask[..., None]) / tokens
        loss += term.weight * parts["hidden_state_loss"]

    pairs = jnp.sum((segments[:, :, None] == segments[:, None, :]) * mask[:, :, None])
    for term in settings.attention:
        layers = list(zip(term.student_layers, term.teacher_layers, strict=True))
        squares = jnp.float32(0)
        for i, j in layers:
            maps = student.attention_maps(states[i], *inputs[1:], layer=i)
            maps -= teacher.attention_maps(teacher_states[j], *inputs[1:], layer=j)
            squares += jnp.sum(jnp.square(maps) * mask[:, None, :, None]) / len(layers)
        parts["attention_loss"] = squares / pairs
        loss += term.weight * parts["attention_loss"]
    return jnp.asarray(loss), {name: jnp.asarray(parts.get(name, 0.0)) for name in PARTS}


def _kl_and_ce(
    student: jax.Array, teacher: jax.Array, labels: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    logp = jax.nn.log_softmax(teacher / temperature)
    logq = jax.nn.log_softmax(student / temperature)
    ce = -jnp.take_along_axis(jax.nn.log_softmax(student), labels[:, None], axis=-1)[:, 0]
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1), ce


def _layers(settings: Loss) -> Iterator[tuple[int, ...]]:
    """The hidden layers that student and teacher must return; block i needs hidden layer i."""
    terms = (*settings.hidden, *settings.attention)
    for side in ("student_layers", "teacher_layers"):
        yield tuple(sorted({layer for term in terms for layer in getattr(term, side)}))


def _report(results: dict[str, Any], work: Path) -> None:
    updates = len(results["online"]["curve"])
    with replacing(work / "curves.csv") as temporary, temporary.open("w", newline="") as file:
        lines = csv.writer(file)
        columns = ("loss", *PARTS)
        lines.writerow(["update", *(f"{name} {x}" for name in results for x in columns)])
        for at in range(updates):
            values = [result["curve"][at] for result in results.values()]
            lines.writerow([at + 1, *(f"{line[x]:.7g}" for line in values for x in columns)])
    table = Table(title="loss of each update")
    for column in ("update", *results):
        table.add_column(column, justify="right")
    for at in np.unique(np.linspace(0, updates - 1, 12).round().astype(int)):
        losses = [result["curve"][at]["loss"] for result in results.values()]
        table.add_row(str(at + 1), *(f"{loss:.4f}" for loss in losses))
    for name in ("kl", "ce", "agreement"):
        measures = [result["heldout"][name] for result in results.values()]
        table.add_row(f"held-out {name}", *(f"{x:.4f}" for x in measures))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{work / 'curves.csv'}")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/seed-parity"))
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--student")
    parser.add_argument("--files", nargs="+", default=["embedded"])
    parser.add_argument("--max-bytes", type=int, default=200_000)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--hidden", type=float, default=0.001, help="weight; 0 for no such term")
    parser.add_argument("--attention", type=float, default=1.0, help="weight; 0 for no such term")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tails", nargs="*", default=["default", "bucket"])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
