"""Bytes a token of a kind of text whose like was, or was not, in the calibration sample.

    python -m benchmarks.drift CACHE PATTERN… [--k 8] [--counts 100] [--rank 256] [--step 4]

CACHE was captured as for `benchmarks.fields`. Each PATTERN (such as `*.rst`) names the sources of
one domain. The domain's rows are encoded twice: with tables and deviations from a sample of all
rows, and from a sample of rows that hold nothing of the domain. The difference is the cost for a
corpus whose later text differs from its calibration sample. The sketch's basis is that of CACHE in
both cases: it decides how much of the logits its numbers keep, not how many bytes they take.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.fields import HeadOf, Quantised, Row, Sizes, add, fitted_heads, rows_of
from decant.schemas import open_cache
from decant.schemas.reading.cache import Cache
from decant.schemas.reading.units import read_unit_rows

_MOSTLY = 0.9
"""Least share of a row's tokens from a domain for the row to count as the domain's."""
_TARGETS = ("head and labels", "counts", "sketch", "all")


@dataclass(frozen=True)
class Calibrated:
    """What a sample of rows gives."""

    heads: list[HeadOf]
    deviations: np.ndarray


def main():
    options = _arguments()
    cache = open_cache(options.cache)
    rows = np.random.default_rng(0).permutation(cache.rows())
    count = max(1, options.calibration // cache.manifest.sequence_length)
    whole = _calibrated(cache, rows[:count], options)
    table = Table(title="bytes a token, with tables that saw the domain → that did not")
    for column in ("domain", "rows", *_TARGETS, "drift"):
        table.add_column(column, justify="right")
    for pattern in options.patterns:
        of_row = shares(cache, pattern)
        own = [r for r in rows[count:] if of_row[r] >= _MOSTLY][: options.rows]
        if not own:
            raise SystemExit(
                f"{pattern}: no row outside the sample is at least {_MOSTLY:.0%} of such sources"
            )
        others = _calibrated(cache, rows[of_row[rows] == 0][:count], options)
        read = list(rows_of(cache, np.array(own), draws=[options.counts]))
        seen, unseen = (
            measured(read, tables, rank=options.rank, step=options.step, cache=cache)
            for tables in (whole, others)
        )
        both = [f"{a:.1f} → {b:.1f}" for a, b in zip(seen, unseen, strict=True)]
        table.add_row(pattern, str(len(own)), *both, f"{unseen[-1] - seen[-1]:+.1f}")
    console = Console(width=120)
    console.print(table)
    tokens = count * cache.manifest.sequence_length
    console.print(
        f"compact, k = {options.k}, {options.counts} counts, a dithered sketch of {options.rank} "
        f"at step {options.step:g}; tables from {tokens:,} tokens. Headers and checksums are left "
        "out."
    )


def _calibrated(cache: Cache, numbers: np.ndarray, options: argparse.Namespace) -> Calibrated:
    sample = list(rows_of(cache, numbers, draws=[options.counts]))
    of_heads = argparse.Namespace(k=[options.k], mass=[], counts=[options.counts])
    heads = fitted_heads(sample, of_heads, vocabulary=cache.manifest.vocabulary_size)
    sketches = np.concatenate([row.sketch for row in sample])
    return Calibrated(heads, sketches.std(axis=0, dtype=np.float64))


def measured(
    rows: Sequence[Row], tables: Calibrated, *, rank: int, step: float, cache: Cache
) -> list[float]:
    """Bytes a position of each of `_TARGETS`."""
    sizes, how = Sizes(), Quantised(rank, step, dither=True)
    for row in rows:
        add(
            sizes,
            row,
            heads=tables.heads,
            sketches=[how],
            deviations=tables.deviations,
            vocabulary=cache.manifest.vocabulary_size,
        )
    (of_head,) = sizes.fields.values()
    held = (of_head.total() - of_head["framing"], sizes.counts.total(), sizes.sketches.total())
    each = [size / sizes.positions for size in held]
    return [*each, sum(each)]


def shares(cache: Cache, pattern: str) -> np.ndarray:
    """For each row, the share of its tokens from sources whose name matches `pattern`."""
    row_shares = []
    for part in cache.manifest.parts:
        matches = np.array([fnmatch(source.name, pattern) for source in part.sources])
        for number, unit in enumerate(part.units):
            for row in read_unit_rows(
                cache.path / part.path, number, unit, length=cache.manifest.sequence_length
            ):
                of_position = row.origins[row.segment_ids[row.segment_ids > 0] - 1, 0]
                row_shares.append(matches[of_position].mean())
    return np.array(row_shares)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", help="a lossless cache with exact sketches of full rank")
    parser.add_argument("patterns", nargs="+", help="a domain's sources, such as *.rst")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--counts", type=int, default=100)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--step", type=float, default=4.0)
    parser.add_argument("--calibration", type=int, default=1 << 14, help="positions")
    parser.add_argument("--rows", type=int, default=100, help="most rows of each domain")
    return parser.parse_args()


if __name__ == "__main__":
    main()
