"""Sampled targets at equal bytes: threshold sampling against RS-KD's draws, on a real teacher.

    python -m benchmarks.sampling CACHE [--rows 12] [--thresholds …] [--draws …]

Rows of CACHE (any cache of `--teacher`) go through the teacher in float32; every sample is made
from its dense probabilities. RS-KD stores N draws as ids and counts; its sets go through the
codec that threshold samples go through, with tables of their own, so that what is compared is
what to keep and not how to write it down. `variance` is the mean over positions of
Σ_v (p̂_v − p_v)², of what was stored. `better by` is RS-KD's variance at as many bytes (the better
of both kinds, interpolated between its N on logarithmic scales) over the method's own.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from models import open_checkpoint
from models.numerics import logits as head
from pipelines.config import Logits
from pipelines.targets import targets_of_logits
from schemas import open_cache
from schemas.codecs import Tables, decode, encode, fit
from schemas.codecs.clusters import choose_orders
from schemas.codecs.codebook import codebook
from schemas.codecs.threshold import decode_sets, encode_sets, nothing
from schemas.draws import Draws
from schemas.targets import Targets, joined

CHUNK = 128


@dataclass(frozen=True)
class RowProbabilities:
    """A row's scored positions: logits [n, V] on demand, a chunk at a time."""

    hidden: np.ndarray

    def chunks(self) -> Iterator[np.ndarray]:
        yield from (self.hidden[at : at + CHUNK] for at in range(0, len(self.hidden), CHUNK))


def main():
    options = _arguments()
    cache = open_cache(options.cache)
    teacher = open_checkpoint(options.teacher)
    vocabulary = cache.manifest.vocabulary_size
    rows, unembedding = _hidden_states(cache, teacher, count=2 * options.rows)
    calibration, measured = rows[: options.rows], rows[options.rows :]
    methods: list[tuple[str, Callable]] = []
    for n in options.draws:
        methods.append((f"RS-KD, {n} draws", lambda n=n: Counts(n, systematic=False)))
        methods.append((f"RS-KD, {n} systematic", lambda n=n: Counts(n, systematic=True)))
    for c in options.thresholds:
        methods.append((f"threshold, c = 1/{round(1 / c)}", lambda c=c: Threshold(c)))
    lines = {}
    for name, make in methods:
        method = make()
        method.fit(calibration, unembedding, vocabulary=vocabulary)
        lines[name] = method.measure(measured, unembedding, vocabulary=vocabulary)
    _print(lines, positions=sum(len(row.hidden) for row in measured), options=options)


class Counts:
    """RS-KD: N draws from the whole distribution, p̂ = count / N."""

    def __init__(self, n: int, *, systematic: bool):
        self.n, self.systematic = n, systematic
        self.rng = np.random.default_rng(n)

    def fit(self, rows: list[RowProbabilities], unembedding: jax.Array, *, vocabulary: int) -> None:
        sets = [self._sample(row, unembedding, vocabulary)[0] for row in rows]
        ids = np.concatenate(sets)
        counts = np.bincount(ids.reshape(-1), minlength=vocabulary + 1)[:vocabulary]
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].astype(np.int32)
        order = order[: 1 << 16]

        def cost(orders: np.ndarray, judged: np.ndarray) -> int:
            book = codebook(Tables({"order": order, "orders": orders}), vocabulary=vocabulary)
            parts = np.array_split(judged, 1 + len(judged) // 1024)
            return sum(len(encode_sets(part, np.zeros_like(part), book=book)) for part in parts)

        orders = choose_orders(ids, order=order, vocabulary=vocabulary, cost=cost)
        self.tables = Tables({"order": order, "orders": orders})

    def measure(self, rows, unembedding, *, vocabulary):
        """Entries, bytes and squared error a position."""
        book = codebook(self.tables, vocabulary=vocabulary)
        entries = size = error = positions = 0
        for row in rows:
            ids, counts, wrong = self._sample(row, unembedding, vocabulary)
            payload = encode_sets(ids, counts, book=book)
            stored = decode_sets(payload, positions=len(ids), book=book, vocabulary=vocabulary)
            assert stored[1].sum() == counts.sum()
            entries += (ids != nothing(vocabulary)).sum()
            size, error, positions = size + len(payload), error + wrong, positions + len(ids)
        return entries / positions, size / positions, error / positions

    def _sample(self, row: RowProbabilities, unembedding: jax.Array, vocabulary: int):
        """Sets [n, N] filled up with nothing, their counts, and the summed squared error."""
        ids = np.full((len(row.hidden), self.n), nothing(vocabulary))
        counts = np.zeros(ids.shape, np.int64)
        error = at = 0
        for hidden in row.chunks():
            p = _probabilities(hidden, unembedding)
            start = self.rng.random((len(p), 1 if self.systematic else self.n))
            points = (np.arange(self.n) + start) / self.n if self.systematic else start
            ends = np.cumsum(p, axis=1)
            for position, (end, point) in enumerate(zip(ends, points, strict=True), start=at):
                drawn = np.searchsorted(end, point * end[-1], side="right")
                distinct, times = np.unique(drawn, return_counts=True)
                ids[position, : len(distinct)] = distinct
                counts[position, : len(distinct)] = times
                of_drawn = p[position - at, distinct]
                # Σ (p̂ − p)² = Σ p² + Σ_drawn (p̂² − 2·p̂·p)
                estimate = times / self.n
                error += (p[position - at] ** 2).sum()
                error += (estimate**2 - 2 * estimate * of_drawn).sum()
            at += len(p)
        return ids, counts, error


class Threshold:
    """Our profile, through its own device code and codec."""

    def __init__(self, c: float):
        self.wanted = Logits(profile="threshold", threshold=c).wanted()
        self.rng = np.random.default_rng(1)
        self._of = jax.jit(
            lambda h, w, starts: targets_of_logits(head(h, w), starts, wanted=self.wanted)
        )

    def fit(self, rows: list[RowProbabilities], unembedding: jax.Array, *, vocabulary: int) -> None:
        sample = joined([self._sample(row, unembedding) for row in rows])
        self.tables = fit("threshold", sample, vocabulary=vocabulary)

    def measure(self, rows, unembedding, *, vocabulary):
        """Entries, bytes and squared error a position."""
        entries = size = error = positions = 0
        shared = {"tables": self.tables, "vocabulary": vocabulary}
        for row in rows:
            blocks = encode("threshold", self._sample(row, unembedding), **shared)
            n = len(row.hidden)
            stored = decode(blocks, positions=n, k=self.wanted.k, **shared)
            size, positions = size + len(blocks[0].payload), positions + n
            at = 0
            for hidden in row.chunks():
                p = _probabilities(hidden, unembedding)
                some = stored[at : at + len(p)]
                at += len(p)
                assert some.draws
                ids = np.concatenate([some.ids, some.draws.ids], axis=1)
                logs = np.concatenate([some.logprobs, some.draws.logprobs], axis=1)
                there, estimate = np.isfinite(logs), np.exp(logs.astype(np.float64))
                true = np.where(there, np.take_along_axis(p, ids, axis=1), 0)
                error += (p**2).sum() + (estimate**2 - 2 * estimate * true).sum()
                entries += there.sum()
        return entries / positions, size / positions, error / positions

    def _sample(self, row: RowProbabilities, unembedding: jax.Array) -> Targets:
        parts = []
        for hidden in row.chunks():
            padded = np.pad(hidden, ((0, CHUNK - len(hidden)), (0, 0)))
            starts = jnp.asarray(self.rng.random(CHUNK), jnp.float32)
            found = jax.device_get(self._of(padded, unembedding, starts))
            found = {name: x[: len(hidden)] for name, x in found.items()}
            draws = Draws(found["draw_ids"], found["draw_logprobs"], ())
            parts.append(Targets(found["ids"], found["logprobs"], found["tail_logmass"], draws))
        return joined(parts)


@jax.jit
def _softmax(hidden: jax.Array, unembedding: jax.Array) -> jax.Array:
    return jax.nn.softmax(head(hidden, unembedding), axis=-1)


def _probabilities(hidden: np.ndarray, unembedding: jax.Array) -> np.ndarray:
    return np.asarray(_softmax(jnp.asarray(hidden), unembedding), np.float64)


def _hidden_states(cache, teacher, *, count: int) -> tuple[list[RowProbabilities], jax.Array]:
    model = teacher.load(dtype="float32")
    unembedding = jnp.asarray(model.unembedding()[:, : cache.manifest.vocabulary_size])
    forward = jax.jit(lambda m, *inputs: m(*inputs)[0])
    found = []
    numbers = np.random.default_rng(0).permutation(cache.rows())[:count]
    for number in numbers:
        batch = cache.read([int(number)], signals=())
        inputs = (batch[name] for name in ("tokens", "segment_ids", "positions"))
        found.append(RowProbabilities(np.asarray(forward(model, *inputs))[batch["loss_mask"]]))
    return found, unembedding


def _print(lines: dict[str, tuple[float, float, float]], *, positions: int, options) -> None:
    curves = [
        np.log(
            [line[1:] for name, line in lines.items() if name.startswith("RS-KD") and kind in name]
        )
        for kind in ("draws", "systematic")
    ]
    table = Table(title=f"sampled targets of {options.teacher}, {positions:,} positions, T = 1")
    for column in ("target", "entries", "B/token", "variance", "better by"):
        table.add_column(column, justify="left" if column == "target" else "right")
    for name, (entries, size, variance) in lines.items():
        rivals = [np.exp(np.interp(np.log(size), *curve.T)) for curve in curves]
        inside = curves[0][0, 0] <= np.log(size) <= curves[0][-1, 0]
        ratio = f"{min(rivals) / variance:.2f}" if inside and "threshold" in name else ""
        table.add_row(name, f"{entries:.1f}", f"{size:.1f}", f"{variance:.2e}", ratio)
    Console(width=100).print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", help="a sealed cache of the teacher; only its rows are read")
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--rows", type=int, default=12, help="measured, and as many to calibrate")
    thresholds = [1 / 12, 1 / 20, 1 / 50, 1 / 100]
    parser.add_argument("--thresholds", type=float, nargs="+", default=thresholds)
    parser.add_argument("--draws", type=int, nargs="+", default=[12, 25, 50, 100, 200, 400])
    return parser.parse_args()


if __name__ == "__main__":
    main()
