"""Speed of the staged exact top-k against `lax.top_k`, at several vocabularies and k.

    python -m benchmarks.top_k [--tokens 256] [--turns 9]

Both are timed alternately on the same logits, after a check that they agree; times are medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from decant.models.mesh.top_k import exact_top_k

VOCABULARIES = (49_152, 131_072, 262_144)
KS = (33, 65, 257, 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    table = Table("vocabulary", "k", "lax.top_k, µs a token", "staged", "faster by")
    for vocabulary in VOCABULARIES:
        draw = np.random.default_rng(vocabulary).normal(size=(options.tokens, vocabulary)) * 3
        logits = jnp.asarray(draw, jnp.float32)
        for k in KS:
            functions = [jax.jit(f, static_argnums=1) for f in (lax.top_k, exact_top_k)]
            plain, staged = (f(logits, k) for f in functions)
            assert all(bool((a == b).all()) for a, b in zip(plain, staged, strict=True))
            times = [[_timed(f, logits, k) for f in functions] for _ in range(options.turns)]
            each = [statistics.median(t) / options.tokens * 1e6 for t in zip(*times, strict=True)]
            ratio = statistics.median(a / b for a, b in times)
            table.add_row(
                f"{vocabulary:,}", str(k), f"{each[0]:.0f}", f"{each[1]:.0f}", f"{ratio:.2f}×"
            )
    Console().print(table)


def _timed(function: Callable, logits: jax.Array, k: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(logits, k))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
