"""Bytes, divergence and speed of every codec profile on the targets of a `lossless` cache.

    python -m benchmarks.codecs CACHE [--k 16 32 64 128] [--calibration 0.05] [--rows N]

Tables are fitted on a share of the rows; all other rows are encoded, one record a row, as in a
capture. `KL` is from the float32 distribution, stored ids and tail, to the decoded one. Speeds are
in processor time of one process, the median over groups of 16 rows: other load matters less.
"""

import argparse
import time
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table

from decant.schemas import open_cache
from decant.schemas.codecs import PROFILES, TAIL, TOPK, Profile, Tables, fit
from decant.schemas.disk.frames import Kind, unpack
from decant.schemas.reading.cache import Cache
from decant.schemas.records.logits import (
    decode_logits,
    encode_logits,
    group_for_decoding,
    open_logits,
)
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.targets import BETAS, Targets, join_targets, nodes_of, tail_logmass_at

CALIBRATION_TOKENS = 1 << 18
ROWS_AT_A_TIME = 16
Row = tuple[Targets, np.ndarray]
"""The targets of a row's scored positions, and a mask of these positions."""


@dataclass
class Measured:
    """Sizes, speeds and divergences of one profile at one k."""

    profile: Profile
    k: int
    temperatures: list[float]
    positions: int = 0
    record_bytes: int = 0
    field_bytes: dict[int, int] = field(default_factory=lambda: {TOPK: 0, TAIL: 0})
    encode_speeds: list[float] = field(default_factory=list)
    decode_speeds: list[float] = field(default_factory=list)
    divergences: dict[float, list[np.ndarray]] = field(default_factory=dict)

    def add(self, rows: list[Row], *, tables: Tables, vocabulary: int) -> None:
        """Encode each row as a record, decode it, and add what was measured."""
        shared = {"tables": tables, "vocabulary": vocabulary}
        start = time.process_time()
        records = [
            encode_logits(targets, row_key=bytes(16), scored=scored, profile=self.profile, **shared)
            for targets, scored in rows
        ]
        encoded = time.process_time()
        spec, length = TargetSpec(self.k), len(rows[0][1])
        opened = [
            open_logits(record, where="benchmark", length=length, spec=spec) for record in records
        ]
        # In batches, as `Cache.read` decodes.
        for some in group_for_decoding(opened):
            decode_logits([opened[i] for i in some], **shared)
        finished = time.process_time()
        positions = sum(len(targets) for targets, _ in rows)
        self.encode_speeds.append(positions / (encoded - start))
        self.decode_speeds.append(positions / (finished - encoded))
        self.positions += positions
        for record in records:
            self.record_bytes += len(record)
            for block in unpack(record, kind=Kind.LOGITS, where="benchmark").blocks:
                if block.field in self.field_bytes:
                    self.field_bytes[block.field] += len(block.payload)
        decoded = [decode_logits([record], **shared) for record in opened]
        for temperature in self.temperatures:
            self.divergences.setdefault(temperature, []).extend(
                divergence(targets, stored, beta=1 / temperature)
                for (targets, _), stored in zip(rows, decoded, strict=True)
            )


def divergence(targets: Targets, stored: Targets, *, beta: float) -> np.ndarray:
    """KL(true ‖ stored) in nats at T = 1/β, in float64.

    Both distributions are over the stored ids and the tail as one category.
    """
    p, q = _log_masses(targets, beta), _log_masses(stored, beta)
    finite = np.isfinite(p)
    return (np.exp(p) * (np.where(finite, p, 0) - np.where(finite, q, 0))).sum(1)


def _log_masses(targets: Targets, beta: float) -> np.ndarray:
    by_id = np.argsort(targets.ids, axis=1)
    head = beta * np.take_along_axis(targets.logprobs.astype(np.float64), by_id, 1)
    tail = tail_logmass_at(targets.tail_logmass.astype(np.float64), beta)
    masses = np.concatenate([head, tail[:, None]], axis=1)
    return masses - np.logaddexp.reduce(masses, axis=1, keepdims=True)


def shortened(targets: Targets, *, k: int, vocabulary: int) -> Targets:
    """The targets with the first k ids; the other ids join the tail, in float64."""
    cut = targets.logprobs[:, k:].astype(np.float64)
    nodes = [np.full(len(targets), np.log(vocabulary - k))]
    held = nodes_of(targets.tail_logmass)
    for beta in BETAS[1:]:
        tail = targets.tail_logmass[:, held.index(beta)].astype(np.float64)
        of_cut = np.logaddexp.reduce(beta * cut, axis=1, initial=-np.inf)
        nodes.append(np.logaddexp(tail, of_cut))
    return Targets(
        ids=np.ascontiguousarray(targets.ids[:, :k]),
        logprobs=np.ascontiguousarray(targets.logprobs[:, :k]),
        tail_logmass=np.stack(nodes, axis=1).astype(np.float32),
    )


def main():
    options = _arguments()
    cache = open_cache(options.cache)
    vocabulary = cache.manifest.vocabulary_size
    rows = np.random.default_rng(0).permutation(cache.rows())[: options.rows]
    calibration = calibration_rows(cache, rows, share=options.calibration)
    table = _table()
    for k in options.k:
        if k > cache.manifest.logits.k:
            continue
        sample = join_targets([read_targets(cache, row, k=k)[0] for row in calibration])
        for profile in options.profiles:
            start = time.process_time()
            tables = fit(profile, sample, vocabulary=vocabulary)
            fitted = time.process_time() - start
            measured = Measured(profile, k, options.temperatures)
            # Warm up: expanding tables and loading code happens once a process.
            warm_up = [read_targets(cache, calibration[0], k=k)]
            Measured(profile, k, []).add(warm_up, tables=tables, vocabulary=vocabulary)
            for at in range(len(calibration), len(rows), ROWS_AT_A_TIME):
                some = [read_targets(cache, row, k=k) for row in rows[at : at + ROWS_AT_A_TIME]]
                measured.add(some, tables=tables, vocabulary=vocabulary)
            _add_line(table, measured, tables=tables, fitted=fitted)
    console = Console(width=150)
    console.print(table)
    console.print(
        f"{len(rows) - len(calibration):,} rows of {cache.manifest.sequence_length}, "
        f"V = {vocabulary:,}; tables from {len(sample):,} positions of {len(calibration):,} other "
        f"rows. B/token is the whole record: both fields, bitmap, header and checksum."
    )


def read_targets(cache: Cache, row: int, *, k: int) -> Row:
    """The targets of a row's scored positions at `k`, and the mask of these positions."""
    batch = cache.read([int(row)])
    scored = batch["loss_mask"][0]
    names = ("topk_ids", "topk_logprobs", "tail_logmass")
    targets = Targets(*(batch[name][0][scored] for name in names))
    return shortened(targets, k=k, vocabulary=cache.manifest.vocabulary_size), scored


def calibration_rows(cache: Cache, rows: np.ndarray, *, share: float) -> np.ndarray:
    most = CALIBRATION_TOKENS // cache.manifest.sequence_length
    return rows[: max(1, min(most, int(len(rows) * share)))]


def _table() -> Table:
    table = Table(title="codecs on the targets of a real teacher, one record a row")
    for column in ("k", "profile", "B/token", "top-k", "tail", "tables kB"):
        table.add_column(column, justify="right")
    table.add_column("KL mean / p99 / max at each T")
    for column in ("encode tok/s", "decode tok/s", "fit s", "tokens"):
        table.add_column(column, justify="right")
    return table


def _add_line(table: Table, measured: Measured, *, tables: Tables, fitted: float) -> None:
    n = measured.positions
    lines = []
    for temperature, parts in measured.divergences.items():
        kl = np.concatenate(parts)
        lines.append(
            f"{temperature:g}: {kl.mean():.1e} / {np.quantile(kl, 0.99):.1e} / {kl.max():.1e}"
        )
    table_bytes = sum(array.nbytes for array in tables.arrays().values())
    table.add_row(
        *(str(measured.k), measured.profile, f"{measured.record_bytes / n:.2f}"),
        *(f"{measured.field_bytes[name] / n:.2f}" for name in (TOPK, TAIL)),
        *(f"{table_bytes / 1e3:,.0f}", "\n".join(lines)),
        f"{np.median(measured.encode_speeds) / 1e3:,.0f}k",
        f"{np.median(measured.decode_speeds) / 1e3:,.0f}k",
        *(f"{fitted:.1f}", f"{n:,}"),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", help="a sealed cache captured with the lossless codec")
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES), choices=PROFILES)
    parser.add_argument("--calibration", type=float, default=0.05, help="share of the rows")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--rows", type=int, default=None, help="use only this many rows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
