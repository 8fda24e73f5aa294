"""Tokens a second of `decant generate`: with a memory of the tokens so far, and without one.

    python -m benchmarks.generation --run runs/student --samples 8 --max-tokens 128

Without one, each token costs a forward pass over whole rows, as in releases before 0.13; all cost
the same, so a few are timed. End tokens do not end a sample here. The first call, which compiles,
is not counted.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from decant.models.mesh.sharding import student_mesh
from decant.models.numerics import logits
from decant.trainer.results.sampling import Request, Sampler, Sampling, draw
from decant.trainer.run.saved_initial import open_initial
from decant.trainer.run.trained_student import load_student

FEW = 8
"""Tokens of each sample that are timed with whole rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/student"))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    graph, params = load_student(asked.run, dtype=asked.dtype)
    sampling = Sampling(max_tokens=asked.max_tokens, temperature=0.8, top_p=asked.top_p)
    vocabulary = open_initial(asked.run).tokenizer().size
    prompt = (np.arange(asked.prompt_tokens) * 37 + 11) % vocabulary
    sampler = Sampler(
        graph,
        params,
        sampling=sampling,
        vocabulary=vocabulary,
        stop=(),
        batch_rows=asked.samples,
        mesh=student_mesh(fsdp=jax.device_count()),
    )
    requests = [Request(prompt.tolist(), 0, sample) for sample in range(asked.samples)]
    next_ids = whole_rows(graph, vocabulary=vocabulary, sampling=sampling)
    rows = np.zeros((asked.samples, len(prompt) + asked.max_tokens), np.int32)
    rows[:, : len(prompt)] = prompt

    def without(tokens: int) -> None:
        for at in range(len(prompt), len(prompt) + tokens):
            rows[:, at] = next_ids(params, rows, at)

    sampler.complete(requests)
    report("memory", asked, asked.max_tokens, lambda: sampler.complete(requests))
    without(1)
    few = min(FEW, asked.max_tokens)
    report("whole rows", asked, few, lambda: without(few))


def report(name: str, asked: argparse.Namespace, tokens: int, write: Callable) -> None:
    """Time `write`, which writes that many tokens of each sample."""
    wall, cpu = time.perf_counter(), time.process_time()
    write()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    count = asked.samples * tokens
    print(
        f"{name:12} {count / wall:8.1f} tokens/s, {cpu / count * 1000:8.2f} ms of CPU a token "
        f"({count} tokens in {wall:.1f} s)"
    )


def whole_rows(graph: nnx.GraphDef, *, vocabulary: int, sampling: Sampling):
    """A function (params, rows, length) → the ids after the first `length` tokens of each row."""

    @jax.jit
    def next_ids(params, rows, length):
        model = nnx.merge(graph, params)
        positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
        hidden, _ = model(rows, jnp.ones_like(rows), positions)
        last = jnp.take(hidden, length - 1, axis=1)
        head = model.unembedding()[:, :vocabulary]
        keys = jax.random.split(jax.random.key(0), len(rows))
        return draw(
            logits(last, head, softcap=model.config.final_softcap), keys, length, sampling=sampling
        )

    return lambda params, rows, length: np.asarray(next_ids(params, rows, length))


if __name__ == "__main__":
    main()
