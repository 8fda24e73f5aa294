"""Bytes a token of a kind of text whose like was, or was not, in the calibration sample.

    python -m benchmarks.drift CACHE PATTERN… [--profile compact] [--k 64] [--calibration 0.1]

CACHE was captured with `lossless`. Each PATTERN (such as `man-*`) names the sources of one domain.
The domain's rows are encoded twice: with tables fitted on a sample of all rows, and on a sample of
rows that hold nothing of the domain. The difference is the cost for a corpus whose later text
differs from its calibration sample.
"""

import argparse
from fnmatch import fnmatch

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.codecs import Measured, calibration_rows, read_targets
from decant.schemas import open_cache
from decant.schemas.codecs import PROFILES, Tables, fit
from decant.schemas.reading.cache import Cache
from decant.schemas.reading.units import read_unit_rows
from decant.schemas.targets.targets import join_targets

_MOSTLY = 0.9
"""Least share of a row's tokens from a domain for the row to count as the domain's."""


def main():
    options = _arguments()
    cache = open_cache(options.cache)
    vocabulary = cache.manifest.vocabulary_size
    share = np.stack([shares(cache, pattern) for pattern in options.patterns])
    rows = np.random.default_rng(0).permutation(cache.rows())

    def tables_from(candidates: np.ndarray) -> Tables:
        count = len(calibration_rows(cache, rows, share=options.calibration))
        sample = join_targets([read_targets(cache, r, k=options.k)[0] for r in candidates[:count]])
        return fit(options.profile, sample, vocabulary=vocabulary)

    whole = tables_from(rows)
    seen = set(calibration_rows(cache, rows, share=options.calibration).tolist())
    table = Table(title=f"{options.profile}, k = {options.k}: tables that saw the domain or not")
    for column in ("domain", "rows", "B/token seen", "B/token unseen", "drift"):
        table.add_column(column, justify="right")
    for pattern, of_row in zip(options.patterns, share, strict=True):
        own = [r for r in rows if of_row[r] >= _MOSTLY and int(r) not in seen][: options.rows]
        others = tables_from(rows[of_row[rows] == 0])
        with_it, without = (
            _size(cache, own, tables=tables, options=options) for tables in (whole, others)
        )
        table.add_row(
            *(pattern, str(len(own)), f"{with_it:.1f}", f"{without:.1f}"),
            f"+{without - with_it:.1f}",
        )
    Console(width=120).print(table)


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


def _size(cache: Cache, rows: list, *, tables: Tables, options: argparse.Namespace) -> float:
    measured = Measured(options.profile, options.k, [])
    for row in rows:
        targets = read_targets(cache, row, k=options.k)
        measured.add([targets], tables=tables, vocabulary=cache.manifest.vocabulary_size)
    return measured.record_bytes / max(measured.positions, 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", help="a sealed cache captured with the lossless codec")
    parser.add_argument("patterns", nargs="+", help="a domain's sources, such as man-*")
    parser.add_argument("--profile", default="compact", choices=PROFILES[:3])
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--calibration", type=float, default=0.1, help="share of the rows")
    parser.add_argument("--rows", type=int, default=100, help="most rows of each domain")
    return parser.parse_args()


if __name__ == "__main__":
    main()
