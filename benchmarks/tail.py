"""Error of the tail's mass between its nodes: stored targets against dense float64 logits.

    python -m benchmarks.tail CACHE [--k 16 32 64] [--rows 8]

Rows of CACHE (any cache of `--teacher`) go through the teacher in float32. Its logits are computed
in float64 from the same hidden states. `KL` is from the exact distribution, with the tail as one
category, to that which a loss computes at T from targets stored with `lossless`.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from decant.models import open_checkpoint
from decant.models.mesh.vocabulary import Vocabulary
from decant.pipelines.teacher.sharded_head import Head
from decant.pipelines.teacher.targets import LogitsSpec, TokenInputs, targets
from decant.schemas import open_cache
from decant.schemas.codecs import NODES
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.targets import tail_logmass_at

TEMPERATURES = (1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.4, 2.8, 3.2, 4.0, 5.5, 8.0, 16.0, 100.0)
CHUNK = 128


def main():
    options = _arguments()
    cache = open_cache(options.cache)
    vocabulary = cache.manifest.vocabulary_size
    model = open_checkpoint(options.teacher).load(dtype="float32")
    unembedding = jnp.asarray(model.unembedding()[:, :vocabulary])
    forward = jax.jit(lambda m, *inputs: m(*inputs)[0])
    errors = {k: [] for k in options.k}
    for number in np.random.default_rng(0).permutation(cache.rows())[: options.rows]:
        batch = cache.read([int(number)], signals=())
        inputs = (batch[name] for name in ("tokens", "segment_ids", "positions"))
        hidden = np.asarray(forward(model, *inputs))[batch["loss_mask"]]
        for at in range(0, len(hidden), CHUNK):
            for k, kl in _errors(hidden[at : at + CHUNK], unembedding, ks=options.k).items():
                errors[k].append(kl)
    table = Table(title=f"KL of the tail grid on {options.teacher}, nats")
    for column in ("k", "mean at worst T", "p99.9", "max", "at T", "positions ≤ 2e-6"):
        table.add_column(column, justify="right")
    for k, parts in errors.items():
        kl = np.concatenate(parts, axis=1)  # temperatures, positions
        worst = kl.max(axis=0)
        table.add_row(
            *(str(k), f"{kl.mean(1).max():.1e}", f"{np.quantile(worst, 0.999):.1e}"),
            *(f"{worst.max():.1e}", f"{TEMPERATURES[kl.max(1).argmax()]:g}"),
            f"{(worst <= 2e-6).sum():,} of {len(worst):,}",
        )
    Console(width=110).print(table)


def _errors(hidden: np.ndarray, unembedding: jax.Array, *, ks: list[int]) -> dict[int, np.ndarray]:
    """KL [temperatures, positions] for each k."""
    logits = hidden.astype(np.float64) @ np.asarray(unembedding, np.float64)
    errors = {}
    for k in ks:
        stored = _targets(
            hidden,
            unembedding,
            TokenInputs(),
            spec=LogitsSpec(TargetSpec(k, betas=NODES["lossless"])),
            head=Head(Vocabulary(unembedding.shape[1])),
        )
        ids, logprobs, mass = (
            np.asarray(stored[name]) for name in ("ids", "logprobs", "tail_logmass")
        )
        rest = logits.copy()
        np.put_along_axis(rest, ids, -np.inf, axis=1)
        top = np.take_along_axis(logits, ids, axis=1)
        errors[k] = np.stack([_kl(top, rest, logprobs, mass, beta=1 / t) for t in TEMPERATURES])
    return errors


def _kl(top, rest, logprobs, mass, *, beta: float) -> np.ndarray:
    highest = rest.max(axis=1, keepdims=True)
    tail = beta * highest[:, 0] + np.log(np.exp(beta * (rest - highest)).sum(axis=1))
    p = np.concatenate([beta * top, tail[:, None]], axis=1)
    read = tail_logmass_at(mass, np.float32(beta))
    q = np.concatenate([np.float32(beta) * logprobs, read[:, None]], axis=1).astype(np.float64)
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(axis=1)


_targets = jax.jit(targets, static_argnames=("spec", "head"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", help="a sealed cache of the teacher; only its rows are read")
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--rows", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
