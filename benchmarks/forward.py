"""Speed of our forward pass against Hugging Face transformers, on the same weights and rows.

    python -m benchmarks.forward [--rows 2] [--length 1024] [--repeats 5]

Both end in the head with a max over the vocabulary, chunked so that [B, T, V] never exists. Passes
alternate between the two, so that a busy machine slows both; the ratio is that of the medians.
DECANT_REFERENCE_PYTHON names an interpreter with torch and transformers (default: the running one;
see `make reference`).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from rich.console import Console
from rich.table import Table

from decant.models import Decoder, open_checkpoint, save_directory
from decant.models.numerics import logits

HEAD_CHUNK = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()

    checkpoint = open_checkpoint(args.teacher)
    tokens = real_tokens(checkpoint, rows=args.rows, length=args.length)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    table = Table("dtype", "ours tok/s", "transformers tok/s", "ratio", "compile s")
    with tempfile.TemporaryDirectory() as scratch:
        save_directory(checkpoint.load(), scratch, checkpoint.tokenizer().files())
        np.save(Path(scratch) / "rows.npy", tokens)
        for dtype in args.dtypes:
            ours, compiling = our_forward(checkpoint.load(dtype=dtype), tokens)
            with Peer(scratch, dtype=dtype, threads=cores or 1) as peer:
                times = alternate(ours, peer.forward, repeats=args.repeats)
            us, them = map(statistics.median, times)
            rates = (f"{tokens.size / us:,.0f}", f"{tokens.size / them:,.0f}")
            table.add_row(dtype, *rates, f"{them / us:.2f}", f"{compiling:.1f}")
    console = Console()
    shape = f"{args.rows} × {args.length} tokens, {cores} cores, {jax.default_backend()}"
    console.print(f"Bare forward through the head, {args.teacher}, {shape}")
    console.print(table)


def real_tokens(checkpoint, *, rows: int, length: int) -> np.ndarray:
    """`rows` equal rows of `length` tokens of Python's standard library, one document each."""
    source = Path(os.__file__).parent
    text = "".join((source / name).read_text() for name in ("argparse.py", "typing.py"))
    (ids,) = checkpoint.tokenizer().encode_batch([text])
    return np.resize(ids, (rows, length)).astype(np.int32)


def our_forward(model: Decoder, tokens: np.ndarray) -> tuple[Callable[[], float], float]:
    """A function that runs one pass and returns its seconds, and the seconds of compiling."""
    segments = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    unembedding = jax.block_until_ready(jnp.array(model.unembedding()))

    @nnx.jit
    def forward(model, unembedding, tokens, segments, positions):
        hidden, _ = model(tokens, segments, positions)
        chunks = hidden.reshape(-1, HEAD_CHUNK, hidden.shape[-1])
        head = partial(logits, unembedding=unembedding, softcap=model.config.final_softcap)
        return lax.map(lambda chunk: head(chunk).max(-1), chunks).sum()

    def run() -> float:
        started = time.perf_counter()
        float(forward(model, unembedding, tokens, segments, positions))
        return time.perf_counter() - started

    return run, run() - run()


def alternate(*passes: Callable[[], float], repeats: int) -> list[list[float]]:
    """Seconds of each pass, run alternately after one warm-up each."""
    for one in passes:
        one()
    turns = [[one() for one in passes] for _ in range(repeats)]
    return [list(times) for times in zip(*turns, strict=True)]


class Peer:
    """Hugging Face transformers in another process, which waits between passes."""

    def __init__(self, directory: str, *, dtype: str, threads: int):
        python = os.environ.get("DECANT_REFERENCE_PYTHON", sys.executable)
        script = Path(__file__).with_name("transformers_peer.py")
        command = [python, script, directory, dtype, Path(directory) / "rows.npy", threads]
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Peer":
        if self._line() != "ready":
            raise RuntimeError(
                "the transformers process did not start; set DECANT_REFERENCE_PYTHON to an "
                "interpreter with torch and transformers (`make reference` installs them)."
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def forward(self) -> float:
        """Seconds of one pass of transformers."""
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()


if __name__ == "__main__":
    main()
