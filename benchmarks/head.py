"""Time and memory of the fused distillation head, against a fused head with hard labels only.

    python -m benchmarks.head [--tokens 2048] [--width 576] [--vocabulary 49152] [--k 64]
        [--counts 50] [--rank 32]

`fused cross-entropy` has the same chunks, products and dtypes, and no teacher. `naive distillation`
is the textbook formula on logits of the whole batch. Each time is divided by that of a
`fused cross-entropy` just before it, because other load changes within seconds. Times and ratios
are medians, but `naive distillation` runs once. Memory is that of the program's temporaries.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from decant.models.numerics import contract
from decant.schemas.targets.sketch import SketchHead
from decant.trainer.loss.batch_fields import loss_fields
from decant.trainer.loss.chunk_loss import Recipe
from decant.trainer.loss.fused_head import distillation_loss
from decant.trainer.loss.sketches import sketch_tables
from decant.trainer.loss.targets import BatchTargets

DRAWS = 32
BASE, NAIVE = "fused cross-entropy", "naive distillation"
SIZES = {"tokens": 2048, "width": 576, "vocabulary": 49152, "k": 64, "counts": 50, "rank": 32}
TAILS = (
    *(("bucket", 1.0), ("bucket", 2.0), ("sampled", 1.0), ("prior", 1.0), ("prior", 2.0)),
    *(("counts", 1.0), ("sketch", 1.0), ("sketch", 4.0)),
)


def main():
    options = _arguments()
    hidden, unembedding, targets, prior, sketch = _inputs(options)

    def distil(tail):
        recipe = Recipe(tail=tail, chunk_tokens=options.chunk)
        needed = BatchTargets.of({name: targets[name] for name in ("labels", *loss_fields(tail))})

        def loss(hidden, unembedding, prior, sketch, temperature):
            return distillation_loss(
                hidden,
                unembedding,
                needed,
                temperature=temperature,
                alpha=0.5,
                prior=prior if tail == "prior" else None,
                sketch=sketch if tail == "sketch" else None,
                recipe=recipe,
            )[0]

        return gradients(loss)

    def gradients(function):
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1)))

    variants = {
        BASE: (
            gradients(lambda h, u: fused_cross_entropy(h, u, targets, chunk=options.chunk)),
            (hidden, unembedding),
        ),
        **{
            f"fused distillation, {tail}, T = {temperature:g}": (
                distil(tail),
                (hidden, unembedding, prior, sketch, temperature),
            )
            for tail, temperature in TAILS
        },
        NAIVE: (
            gradients(lambda h, u: naive_distillation(h, u, targets)),
            (hidden, unembedding),
        ),
    }
    compiled = {
        name: (function.lower(*arguments).compile(), arguments)
        for name, (function, arguments) in variants.items()
    }
    times, ratios = _against(BASE, compiled, repeats=options.repeats)
    memory = {name: f.memory_analysis().temp_size_in_bytes for name, (f, _) in compiled.items()}
    table = Table(
        title=f"N={options.tokens} D={options.width} V={options.vocabulary} k={options.k} "
        f"{options.dtype}, {jax.devices()[0].device_kind}"
    )
    for column in ("head", "ms", "÷ cross-entropy", "temporaries MiB", "÷ naive"):
        table.add_column(column, justify="left" if column == "head" else "right")
    naive = memory[NAIVE]
    for name in variants:
        table.add_row(
            name,
            f"{1e3 * statistics.median(times[name]):.0f}",
            f"{statistics.median(ratios[name]):.3f}",
            f"{memory[name] / 2**20:.0f}",
            f"{memory[name] / naive:.2f}",
        )
    Console().print(table)


def fused_cross_entropy(hidden, unembedding, targets, *, chunk):
    """Cross-entropy with hard labels over chunks, its gradients computed in the forward pass."""

    @jax.custom_vjp
    def loss(hidden, unembedding):
        return run(hidden, unembedding)[0]

    def run(hidden, unembedding):
        batch = len(hidden)
        step = chunk // batch
        weights = unembedding.astype(hidden.dtype)

        def body(carry, xs):
            total, d_unembedding = carry
            h, label, mask = (x.reshape(-1, *x.shape[2:]) for x in xs)
            logits = contract("cd,dv->cv", h, weights)
            top = jnp.max(logits, -1, keepdims=True)
            normaliser = top[:, 0] + jnp.log(jnp.sum(jnp.exp(logits - top), -1))
            picked = jnp.take_along_axis(logits, label[:, None], -1)[:, 0]
            weight = mask.astype(jnp.float32)
            d_logits = weight[:, None] * jnp.exp(logits - normaliser[:, None])
            d_logits = d_logits.at[jnp.arange(len(label)), label].add(-weight).astype(h.dtype)
            d_hidden = contract("cv,dv->cd", d_logits, weights).reshape(xs[0].shape).astype(h.dtype)
            total += jnp.sum(weight * (normaliser - picked))
            return (total, d_unembedding + contract("cd,cv->dv", h, d_logits)), d_hidden

        def chunked(x):
            return jnp.moveaxis(x.reshape(batch, -1, step, *x.shape[2:]), 1, 0)

        xs = jax.tree.map(chunked, (hidden, targets["labels"], targets["loss_mask"]))
        start = (jnp.float32(0), jnp.zeros(unembedding.shape, jnp.float32))
        (total, d_unembedding), d_hidden = jax.lax.scan(body, start, xs)
        return total, (jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape), d_unembedding)

    loss.defvjp(run, lambda gradients, g: tuple((x * g).astype(x.dtype) for x in gradients))
    return loss(hidden, unembedding)


def naive_distillation(hidden, unembedding, targets, *, temperature=2.0, alpha=0.5):
    """The loss with tail = "bucket" on logits of the whole batch, differentiated by JAX."""
    logits = contract("btd,dv->btv", hidden, unembedding)
    logq = jax.nn.log_softmax(logits / temperature)
    beta = 1 / temperature
    stored = jnp.zeros(logits.shape, bool)
    rows = jnp.indices(targets["topk_ids"].shape, sparse=True)
    stored = stored.at[rows[0], rows[1], targets["topk_ids"]].set(True)
    head = beta * targets["topk_logprobs"]
    # One node stands for A(β), because only the cost matters here, not the value.
    mass = targets["tail_logmass"][..., 3]
    normaliser = jnp.logaddexp(jax.nn.logsumexp(head, -1), mass)
    logp, logt = head - normaliser[..., None], mass - normaliser
    tau = jax.nn.logsumexp(jnp.where(stored, -jnp.inf, logq), -1)
    picked = jnp.take_along_axis(logq, targets["topk_ids"], -1)
    kl = jnp.sum(jnp.exp(logp) * (logp - picked), -1) + jnp.exp(logt) * (logt - tau)
    ce = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets["labels"][..., None], -1)[..., 0]
    return jnp.sum(targets["loss_mask"] * (alpha * temperature**2 * kl + (1 - alpha) * ce))


def _inputs(options):
    rng = np.random.default_rng(0)
    batch = 4
    shape = (batch, options.tokens // batch)
    hidden = jnp.asarray(rng.normal(size=(*shape, options.width)), options.dtype)
    unembedding = jnp.asarray(
        rng.normal(size=(options.width, options.vocabulary)) / np.sqrt(options.width), jnp.float32
    )
    scores = rng.random((*shape, options.vocabulary), np.float32)
    ids = np.argpartition(scores, options.k + DRAWS, -1)[..., : options.k + DRAWS].astype(np.int32)
    ids, drawn = ids[..., : options.k], ids[..., options.k :]
    logprobs = -np.sort(rng.exponential(3, ids.shape).astype(np.float32), -1) - 2
    mass = np.linspace(np.log(options.vocabulary - options.k), -1, 7)
    labels = rng.integers(0, options.vocabulary, shape)
    mass = np.broadcast_to(mass, (*shape, 7))
    counts = np.ones((*shape, options.counts), np.int32)
    targets = {
        "tokens": labels.astype(np.int32),  # for the shape only
        "segment_ids": labels,
        "positions": labels,
        "labels": labels.astype(np.int32),
        "loss_mask": np.ones(shape, bool),
        "topk_ids": ids,
        "topk_logprobs": logprobs,
        "tail_logmass": mass.astype(np.float32),
        "tail_ids": drawn,
        "tail_logprobs": np.full(drawn.shape, -12.0, np.float32),
        "tail_logweights": np.full(drawn.shape, 10.0 - 3.0, np.float32),
        "count_ids": np.sort(rng.integers(0, options.vocabulary, counts.shape)).astype(np.int32),
        "counts": counts,
        "sketch": rng.normal(size=(*shape, options.rank)).astype(np.float32),
        "sketch_basis": np.zeros(batch, np.int32),
    }
    targets = {name: jnp.asarray(array) for name, array in targets.items()}
    prior = jax.nn.log_softmax(3 * rng.normal(size=(7, options.vocabulary)))
    head = rng.normal(size=(options.rank, options.vocabulary)) / np.sqrt(options.rank)
    bias = rng.normal(size=options.vocabulary)
    sketch = sketch_tables([SketchHead(head.astype(np.float32), bias.astype(np.float32))])
    sketch = jax.tree.map(jnp.asarray, sketch)
    return hidden, unembedding, targets, jnp.asarray(prior, jnp.float32), sketch


def _against(base, compiled, *, repeats):
    """Seconds of each function's runs, and their ratios to the run of `base` before each."""

    def seconds(name):
        function, arguments = compiled[name]
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        return time.perf_counter() - start

    for name in compiled:
        seconds(name)  # warms up
    times, ratios = ({name: [] for name in compiled} for _ in range(2))
    for number in range(repeats):
        for name in compiled:
            if name == NAIVE and number:
                continue  # It takes longer than all others together.
            before, taken = seconds(base), seconds(name)
            times[name].append(taken)
            ratios[name].append(taken / before)
    return times, ratios


def _arguments():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
