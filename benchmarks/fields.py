"""Bytes of heads, labels, counts and sketches through the codecs, over k, N and r.

    python -m benchmarks.fields CACHE [--k 0 8 32] [--mass 0.95] [--counts 20 50 170]
        [--ranks 64 128 256 full] [--steps 1 4] [--no-dither] [--positions 500000]

CACHE was captured with `--signals.logits.profile lossless --signals.logits.draws 0
--signals.logits.sketch.rank full --signals.logits.sketch.step 0`: its sketches give the teacher's
dense distribution, of which this draws counts. Tables and deviations come from `--calibration`
positions; all others are encoded, one record a row. `entropy` is the sum of the empirical entropies
of the columns, given the dither where there is one.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.codecs import shortened
from decant.schemas import open_cache
from decant.schemas.codecs import Tables, counts_field, fit, sketch_field
from decant.schemas.reading.cache import Cache
from decant.schemas.records.logits import decode_logits, encode_logits, field_bytes, open_logits
from decant.schemas.records.rows import next_tokens
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.counts import Counts, count_draws
from decant.schemas.targets.draws import COUNTS_STREAM, uniform_starts
from decant.schemas.targets.sketch import SketchHead
from decant.schemas.targets.targets import Targets, join_targets

_LARGEST = 1 << 9
_CHUNK = 128
_BINS = 32
"""Parts of the way from a dither to the nearer edge, for entropies."""


@dataclass(frozen=True)
class Row:
    """What a row of CACHE says about its scored positions."""

    key: bytes
    targets: Targets
    """At the cache's k, with labels."""
    sketch: np.ndarray
    counts: dict[int, Counts]
    """By N."""


@dataclass
class Sizes:
    """Sums over the measured positions."""

    positions: int = 0
    fields: dict[str, Counter[str]] = field(default_factory=dict)
    """Bytes of logits records by field, by name of the head."""
    counts: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Bytes of counts by head and N."""
    ids: Counter[int] = field(default_factory=Counter)
    """Counted ids by N."""
    sketches: Counter["Quantised"] = field(default_factory=Counter)
    levels: dict["Quantised", np.ndarray] = field(default_factory=dict)
    """How often each level of each column occurs: [bins of the dither, columns, levels]."""


@dataclass(frozen=True)
class Quantised:
    """A sketch and how it is stored."""

    rank: int
    step: float
    dither: bool


@dataclass(frozen=True)
class HeadOf:
    """A head and the tables for it."""

    k: int
    mass: float | None
    tables: Tables
    of_counts: dict[int, Tables]

    @property
    def name(self) -> str:
        """What the tables call it."""
        return f"{self.k}" if self.mass is None else f"{self.k}, mass {self.mass:g}"

    def record(self, row: Row, *, vocabulary: int) -> bytes:
        """The row's logits record."""
        return encode_logits(
            head(row.targets, k=self.k, vocabulary=vocabulary),
            row_key=row.key,
            scored=np.ones(len(row.targets), bool),
            profile="compact",
            tables=self.tables,
            vocabulary=vocabulary,
            mass=self.mass,
        )

    def read(self, record: bytes, *, length: int, vocabulary: int) -> Targets:
        """What a reader of the record gets."""
        spec = TargetSpec(self.k, labels=True, mass=self.mass)
        opened = open_logits(record, where="benchmark", length=length, spec=spec)
        return decode_logits([opened], tables=self.tables, vocabulary=vocabulary)


def head(targets: Targets, *, k: int, vocabulary: int) -> Targets:
    """The first k ids, for k = 0 none; labels stay."""
    if k:
        short = shortened(targets, k=k, vocabulary=vocabulary)
        return replace(short, label_logprobs=targets.label_logprobs)
    nothing = np.zeros((len(targets), 0), np.float32)
    labels = targets.label_logprobs
    return Targets(nothing.astype(np.int32), nothing, nothing, label_logprobs=labels)


def rows_of(cache: Cache, numbers: np.ndarray, *, draws: list[int]) -> Iterator[Row]:
    """The rows with these numbers, with counts of each N in `draws`."""
    sketch_head = cache.sketch_head()
    for number in numbers.tolist():
        batch = cache.read([number])
        scored = batch["loss_mask"][0]
        if not scored.any():
            continue
        key = int(number).to_bytes(16, "little")
        sketch = batch["sketch"][0][scored]
        labels = next_tokens(batch["tokens"])[0][scored]
        counts, label_logprobs = _dense(sketch, labels, key, head=sketch_head, draws=draws)
        names = ("topk_ids", "topk_logprobs", "tail_logmass")
        targets = Targets(*(batch[name][0][scored] for name in names))
        targets = replace(targets, label_logprobs=label_logprobs)
        yield Row(key, targets, sketch, counts)


def _dense(
    sketch: np.ndarray, labels: np.ndarray, key: bytes, *, head: SketchHead, draws: list[int]
) -> tuple[dict[int, Counts], np.ndarray]:
    """Counts of each N, and the labels' log-probabilities, from the dense distribution."""
    starts = uniform_starts(key, positions=len(sketch), stream=COUNTS_STREAM).astype(np.float64)
    drawn: dict[int, list[np.ndarray]] = {n: [] for n in draws}
    of_labels = []
    for at in range(0, len(sketch), _CHUNK):
        here = slice(at, at + _CHUNK)
        logits = head.logits(sketch[here]).astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        masses = np.exp(logits)
        total = masses.sum(1)
        rows = np.arange(len(logits))
        of_labels.append(logits[rows, labels[here]] - np.log(total))
        edges = np.cumsum(masses / total[:, None], axis=1)
        edges[:, -1] = 1.0
        edges += rows[:, None]  # one ascending list for all positions
        for n, parts in drawn.items():
            points = rows[:, None] + (np.arange(n) + starts[here, None]) / n
            ids = np.searchsorted(edges.reshape(-1), points.reshape(-1), side="right")
            ids = ids.reshape(points.shape) - rows[:, None] * edges.shape[1]
            parts.append(np.minimum(ids, edges.shape[1] - 1).astype(np.int32))
    counts = {n: count_draws(np.concatenate(parts)) for n, parts in drawn.items()}
    return counts, np.concatenate(of_labels).astype(np.float32)


def fitted_heads(
    sample: list[Row], options: argparse.Namespace, *, vocabulary: int
) -> list[HeadOf]:
    """The heads to measure, with tables from the sample."""
    wanted = [(k, None) for k in options.k]
    wanted += [(max(options.k), mass) for mass in options.mass]
    heads = []
    for k, mass in wanted:
        short = [head(row.targets, k=k, vocabulary=vocabulary) for row in sample]
        tables = fit("compact", join_targets(short), vocabulary=vocabulary, mass=mass)
        found = HeadOf(k, mass, tables, {})
        read = [
            found.read(
                found.record(row, vocabulary=vocabulary),
                length=len(row.targets),
                vocabulary=vocabulary,
            )
            for row in sample
        ]
        for n in options.counts:
            counts = _join([row.counts[n] for row in sample])
            found.of_counts[n] = counts_field.fit(
                counts, head=join_targets(read), vocabulary=vocabulary
            )
        heads.append(found)
    return heads


def _join(parts: list[Counts]) -> Counts:
    width = max(part.ids.shape[1] for part in parts)

    def padded(name: str) -> np.ndarray:
        arrays = (getattr(part, name) for part in parts)
        return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in arrays])

    return Counts(padded("ids"), padded("counts"), parts[0].draws)


def add(
    sizes: Sizes,
    row: Row,
    *,
    heads: list[HeadOf],
    sketches: list[Quantised],
    deviations: np.ndarray,
    vocabulary: int,
) -> None:
    """Encode one row in every way and add the sizes."""
    sizes.positions += len(row.targets)
    for n, counts in row.counts.items():
        sizes.ids[n] += int((counts.counts > 0).sum())
    for found in heads:
        record = found.record(row, vocabulary=vocabulary)
        sizes.fields.setdefault(found.name, Counter()).update(field_bytes(record, where=""))
        read = found.read(record, length=len(row.targets), vocabulary=vocabulary)
        for n, counts in row.counts.items():
            block = counts_field.encode(
                counts, head=read, tables=found.of_counts[n], vocabulary=vocabulary
            )
            sizes.counts[found.name, n] += len(block.payload)
    for how in sketches:
        values, spread = np.ascontiguousarray(row.sketch[:, : how.rank]), deviations[: how.rank]
        block = sketch_field.encode(
            values,
            deviations=spread,
            step=how.step,
            dither=how.dither,
            row_key=row.key,
            tables=Tables({}),
        )
        sizes.sketches[how] += len(block.payload)
        dither = sketch_field.dither_of(row.key, positions=len(values)) if how.dither else None
        size = sketch_field.step_size(spread, how.step)
        levels = sketch_field.levels_of(values, size=size, dither=dither)
        _count_levels(sizes, how, levels, dither)


def _count_levels(
    sizes: Sizes, how: Quantised, levels: np.ndarray, dither: np.ndarray | None
) -> None:
    width = 2 * _LARGEST + 1
    shape = (_BINS if how.dither else 1, how.rank, width)
    held = sizes.levels.setdefault(how, np.zeros(shape, np.int32))
    whole = np.clip(levels, -_LARGEST, _LARGEST).astype(np.int64)
    bins = np.zeros((len(levels), 1), np.int64)
    if dither is not None:  # both edges alike, as in the codec
        below = dither < 1 << 15
        whole[below] *= -1
        bins = (np.where(below, dither, ~dither).astype(np.int64) * _BINS >> 15)[:, None]
    at = (bins * how.rank + np.arange(how.rank)) * width + whole + _LARGEST
    np.add.at(held.reshape(-1), at.reshape(-1), 1)


def entropies(counts: np.ndarray) -> float:
    """Bytes of a position: the columns' empirical entropies, summed, from counts [bins, columns,
    levels]; given the bin."""
    in_bin = counts.sum(2, keepdims=True)
    shares = counts / np.maximum(in_bin, 1)
    logs = np.log2(np.where(counts > 0, shares, 1))
    return float(-(counts * logs).sum() / in_bin[:, :1].sum() / 8)


def main():
    options = _arguments()
    cache = open_cache(options.cache)
    vocabulary, length = cache.manifest.vocabulary_size, cache.manifest.sequence_length
    numbers = np.random.default_rng(0).permutation(cache.rows())
    first = max(1, options.calibration // length)
    sample = list(rows_of(cache, numbers[:first], draws=options.counts))
    heads = fitted_heads(sample, options, vocabulary=vocabulary)
    whole = np.concatenate([row.sketch for row in sample])
    deviations = whole.std(axis=0, dtype=np.float64)
    ranks = [whole.shape[1] if rank == "full" else int(rank) for rank in options.ranks]
    sketches = [Quantised(rank, step, options.dither) for rank in ranks for step in options.steps]
    sizes = Sizes()
    for row in rows_of(cache, numbers[first:], draws=options.counts):
        if sizes.positions >= options.positions:
            break
        add(
            sizes,
            row,
            heads=heads,
            sketches=sketches,
            deviations=deviations,
            vocabulary=vocabulary,
        )
    console = Console(width=110)
    for table in tables_of(sizes):
        console.print(table)
    console.print(
        f"{sizes.positions:,} positions in rows of {length}, V = {vocabulary:,}; tables and "
        f"deviations from {len(whole):,} positions of other rows."
    )


def tables_of(sizes: Sizes) -> Iterator[Table]:
    """The tables to print: bytes a position."""
    n = sizes.positions
    names = ("top-k", "tail", "labels", "framing")
    heads = [
        (name, *(of[x] / n for x in names), sum(of.values()) / n)
        for name, of in sizes.fields.items()
    ]
    yield _table("heads", ("k", *names, "all"), heads)
    counts = [
        (name, str(draws), sizes.ids[draws] / n, size / n, size / sizes.ids[draws])
        for (name, draws), size in sizes.counts.items()
    ]
    columns = ("k", "N", "ids", "bytes", "bytes an id")
    yield _table("counts, coded with the head", columns, counts)
    sketches = []
    for how, size in sizes.sketches.items():
        entropy = entropies(sizes.levels[how])
        name = f"{how.rank} dithered" if how.dither else f"{how.rank}"
        above = f"{size / n / entropy - 1:+.1%}"
        sketches.append((name, f"{how.step:g}", size / n, entropy, above))
    yield _table("sketches", ("r", "step", "bytes", "entropy", "above it"), sketches)


def _table(title: str, columns: tuple[str, ...], lines: list[tuple[str | float, ...]]) -> Table:
    table = Table(*columns, title=title)
    for line in lines:
        table.add_row(*(x if isinstance(x, str) else f"{x:.3f}" for x in line))
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", help="a lossless cache with exact sketches of full rank")
    parser.add_argument("--k", type=int, nargs="+", default=[0, 8, 32])
    parser.add_argument("--mass", type=float, nargs="*", default=[0.95])
    parser.add_argument("--counts", type=int, nargs="+", default=[20, 50, 170])
    parser.add_argument("--ranks", nargs="+", default=["64", "128", "256", "full"])
    parser.add_argument("--steps", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--dither", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--calibration", type=int, default=1 << 14, help="positions")
    parser.add_argument("--positions", type=int, default=500_000, help="positions to measure")
    return parser.parse_args()


if __name__ == "__main__":
    main()
