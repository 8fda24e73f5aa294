"""Training from a bucket through the mirror, cold and warm, against training from the disk.

    python -m benchmarks.mirror [CACHE] [--units 32] [--unit-rows 256] [--shuffle global blocks]
        [--megabytes 200] [--milliseconds 20]     the link to the bucket
        [--device-rows 250]   in place of a student here: a device that learns so many rows a second
                              and needs no processor of this machine
        [--copy]              `decant copy` up and down instead, beside the bare client

CACHE is stretched: its records, repeated in more and larger units. The bucket is a SeaweedFS on
this machine, behind a proxy that delays and slows answers as the link would. A round is an epoch
from the disk, in the first of the orders, then for each order one from an empty mirror (`cold`) and
one from what that left (`warm`). The ratio `÷ disk` is the time of the disk's epoch divided by the
mirror's, so 1 means that training is no slower. An epoch's time is all from opening the cache to
the last update. `first` are the seconds of it until the first batch is there, and `then ÷ disk` is
the ratio of what follows: that of a long epoch, which more `--units` make. `waits` is the share of
what follows that is spent waiting for batches. Server and proxy run on the same cores: their
processor time is shown apart (`theirs`), beside this process's own (`CPU`), both in milliseconds a
row. On a busy machine compare the own one.

`requests` and `MB` are those of the cold epoch; `expected` is the arithmetic of one request for
each record (`global`), or for each block of 64 rows in each file (`blocks`), and two to open a
file. Neighbours that lie less than 256 KiB apart come by one request, and so do those in 256 KiB of
the file of rows, so there may be fewer.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from decant.models import ModelConfig
from decant.models.mesh.sharding import student_mesh
from decant.pipelines.upkeep.copy import copy
from decant.schemas import Cache, open_cache
from decant.schemas.disk.layout import LOGITS, ROWS
from decant.schemas.reading.held import loss_targets, tail_signals
from decant.store import open_store
from decant.trainer.config import Data, Loss, Optimiser, Train
from decant.trainer.data.batches import Batches
from decant.trainer.data.block_order import BLOCK_ROWS
from decant.trainer.loss.batch_fields import to_device
from decant.trainer.loss.objective import Objective, Tables
from decant.trainer.run.freed_memory import keep_freed_memory
from decant.trainer.run.loss_inputs import sketch_inputs, tail_prior, with_tail
from decant.trainer.run.student_parameters import graph_and_parameters
from decant.trainer.update.step import initial_state, make_train_step
from tests.making.bucket_server import BUCKET, bucket_server
from tests.making.models import random_decoder
from tests.making.slow_link import slow_link
from tests.making.stretched import stretched

Learn = Callable[[dict[str, np.ndarray]], None]
"""Takes a batch; returns when the student has learned from it."""
_COLUMNS = (
    *("rows", "from", "÷ disk", "first", "then ÷ disk", "rows/s", "waits", "CPU", "theirs"),
    *("requests", "expected", "MB"),
)
_TICKS = os.sysconf("SC_CLK_TCK")


class Served(NamedTuple):
    """A bucket behind a slow link."""

    url: str
    endpoint: str
    """Of the server itself."""
    processes: tuple[int, ...]
    """Server and link."""


class Epoch(NamedTuple):
    """One epoch; seconds."""

    seconds: float
    first: float
    """Of them, until the first batch was there."""
    waited: float
    """Of the others, for batches."""
    own: float
    """Processor time of this process."""
    theirs: float
    """Processor time of server and link."""
    requests: int
    bytes: int


def main() -> None:
    """Measure and print."""
    options = _arguments()
    keep_freed_memory()  # as `decant train` does
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="mirror-") as folder:
        scratch = Path(folder)
        cache = stretched(
            open_cache(options.cache),
            scratch / "cache",
            units=options.units,
            rows=options.unit_rows,
        )
        with _served(scratch, options) as bucket:
            if options.copy:
                Console(width=150).print(_copies(cache, bucket, scratch, options))
            else:
                Console(width=150).print(_epochs(cache, bucket, scratch, options))


@contextlib.contextmanager
def _served(scratch: Path, options: argparse.Namespace) -> Iterator[Served]:
    """A bucket that the environment leads to over the link."""
    place = scratch / "server"
    place.mkdir()
    link = {"megabytes": options.megabytes, "milliseconds": options.milliseconds}
    with (
        bucket_server(place) as server,
        slow_link(server.endpoint, **link) as (address, process),
        mock.patch.dict(os.environ, server.environment() | {"AWS_ENDPOINT_URL": address}),
    ):
        yield Served(f"s3://{BUCKET}/cache", server.endpoint, (server.process, process))


def _epochs(cache: Cache, bucket: Served, scratch: Path, options: argparse.Namespace) -> Table:
    """Epochs from the disk and through a mirror, for each order of rows."""
    with mock.patch.dict(os.environ, AWS_ENDPOINT_URL=bucket.endpoint):
        copy(cache.path, bucket.url)
    loss, learn = _student(cache, options)
    if options.device_rows:
        learn = _device(options)
    table = Table(title=_title(cache, loss, options))
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("rows", "from") else "right")
    files = [ROWS, LOGITS, *tail_signals(loss.tail)]
    runs = [(shuffle, source) for shuffle in options.shuffle for source in ("cold", "warm")]
    runs.insert(0, (options.shuffle[0], "disk"))
    done: dict[tuple[str, str], list[Epoch]] = {run: [] for run in runs}
    updates = len(cache.rows(split="train")) // options.rows
    for number in range(-1, options.rounds):
        mirrors = scratch / f"mirrors-{number}"
        # `cold` before its `warm`, the disk first and last in turns.
        for shuffle, source in runs if number % 2 else [*runs[1:], runs[0]]:
            config = Data(batch_rows=options.rows, shuffle=shuffle)
            opening = functools.partial(open_cache, bucket.url, mirror=mirrors / shuffle)
            if source == "disk":
                opening = functools.partial(open_cache, cache.path)
            count = updates if number >= 0 else 4  # the first round compiles
            epoch = _epoch(opening, config, loss, learn, bucket.processes, updates=count)
            done[shuffle, source] += [epoch] if number >= 0 else []
        shutil.rmtree(mirrors)
    for (shuffle, source), epochs in done.items():
        expected = _expected_requests(cache, files, shuffle) if source == "cold" else 0
        table.add_row(shuffle, source, *_cells(epochs, done[runs[0]], len(cache), expected))
    return table


def _epoch(
    opening: Callable[[], Cache],
    config: Data,
    loss: Loss,
    learn: Learn,
    processes: tuple[int, ...],
    *,
    updates: int,
) -> Epoch:
    """Open a cache and do an epoch of updates."""
    theirs, own, begin = processor_seconds(processes), time.process_time(), time.perf_counter()
    cache = opening()
    batches = Batches(cache, config=config, targets=loss_targets(loss.tail))
    batch = batches.next()
    first, waited = time.perf_counter() - begin, 0.0
    for number in range(updates):
        if number:
            asked = time.perf_counter()
            batch = batches.next()
            waited += time.perf_counter() - asked
        learn(batch)
    seconds = time.perf_counter() - begin
    batches.close()
    mirror = cache.mirror
    return Epoch(
        seconds,
        first,
        waited,
        time.process_time() - own,
        processor_seconds(processes) - theirs,
        mirror.requests if mirror else 0,
        mirror.bytes if mirror else 0,
    )


def _student(cache: Cache, options: argparse.Namespace) -> tuple[Loss, Learn]:
    """The loss that `decant train` would choose, and a small student's compiled update."""
    config, _ = with_tail(Train(run=Path("/nonexistent")), cache=cache)
    loss, mesh = config.loss, student_mesh()
    shape = ModelConfig(
        vocab_size=cache.manifest.vocabulary_size,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=options.width // 4,
        max_positions=cache.manifest.sequence_length,
        tie_embeddings=True,
    )
    graph, params = graph_and_parameters(random_decoder(shape, scale=0.02))
    step = make_train_step(
        Objective(graph, loss, vocabulary=shape.vocab_size),
        optimiser=Optimiser(),
        steps=10**6,
        tables=Tables(
            prior=tail_prior(cache, loss=loss, mesh=mesh),
            sketch=sketch_inputs([cache], loss=loss, mesh=mesh),
        ),
    )
    state = initial_state(params, config=Optimiser())

    def learn(batch: dict[str, np.ndarray]) -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, to_device(batch, mesh=mesh, tail=loss.tail)))

    return loss, learn


def _device(options: argparse.Namespace) -> Learn:
    """A device that is busy and needs no processor."""

    def learn(batch: dict[str, np.ndarray]) -> None:
        time.sleep(len(batch["tokens"]) / options.device_rows)

    return learn


def _expected_requests(cache: Cache, files: list[str], shuffle: str) -> int:
    """Requests of an epoch: for each record or block, and two to open a file."""
    records = len(cache) if shuffle == "global" else -(-len(cache) // BLOCK_ROWS)
    return len(files) * (records + 2 * len(cache.manifest.parts[0].units))


def _cells(epochs: list[Epoch], disk: list[Epoch], rows: int, expected: int) -> list[str]:
    pairs = list(zip(disk, epochs, strict=True))
    ratios = (
        [base.seconds / epoch.seconds for base, epoch in pairs],
        [(base.seconds - base.first) / (epoch.seconds - epoch.first) for base, epoch in pairs],
    )
    whole, then = (with_interval(ratio) if epochs is not disk else "1" for ratio in ratios)
    return [
        whole,
        f"{statistics.median(epoch.first for epoch in epochs):.2f}",
        then,
        f"{statistics.median(rows / epoch.seconds for epoch in epochs):,.0f}",
        f"{statistics.median(e.waited / (e.seconds - e.first) for e in epochs):.1%}",
        f"{statistics.median(epoch.own for epoch in epochs) / rows * 1e3:.2f}",
        f"{statistics.median(epoch.theirs for epoch in epochs) / rows * 1e3:.2f}",
        *([f"{epochs[0].requests:,}", f"{expected:,}"] if expected else ["", ""]),
        f"{epochs[0].bytes / 1e6:,.0f}" if expected else "",
    ]


def with_interval(values: list[float]) -> str:
    """The median, and the order statistics that hold the true one 19 times out of 20 or more."""
    ordered, out = sorted(values), 0
    while binom_cdf(out, len(values)) <= 0.025:
        out += 1
    low, high = ordered[max(out - 1, 0)], ordered[len(values) - max(out, 1)]
    return f"{statistics.median(values):.3f} [{low:.3f}, {high:.3f}]"


def binom_cdf(most: int, count: int) -> float:
    """The chance that a fair coin shows heads at most so often in `count` throws."""
    return sum(math.comb(count, heads) for heads in range(most + 1)) / 2**count


def processor_seconds(processes: tuple[int, ...]) -> float:
    """Processor time that these have used."""
    total = 0
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def _copies(cache: Cache, bucket: Served, scratch: Path, options: argparse.Namespace) -> Table:
    """`decant copy` and the client alone, four files at a time, there and back."""
    files = [path for path in cache.path.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    names = ("copy up", "client up", "copy down", "client down")
    done: dict[str, list[float]] = {name: [] for name in names}

    def timed(name: str, act: Callable[[], object]) -> None:
        begin = time.perf_counter()
        act()
        done[name].append(size / 1e6 / (time.perf_counter() - begin))

    def client(act: Callable[[Any, str, Path], object], at: str) -> None:
        store = open_store(at)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda p: act(store, p.relative_to(cache.path).as_posix(), p), files))

    def put(store: Any, key: str, path: Path) -> None:
        store.client.put(key, path.read_bytes(), use_multipart=False)

    def get(store: Any, key: str, path: Path) -> None:
        data = bytes(store.client.get(key).bytes())
        target = scratch / "plain" / key
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    for number in range(options.rounds):
        ours, plain = f"{bucket.url}-{number}", f"{bucket.url}-plain-{number}"
        acts = [
            ("copy up", lambda ours=ours: copy(cache.path, ours)),
            ("client up", lambda plain=plain: client(put, plain)),
            ("copy down", lambda ours=ours: copy(ours, scratch / "back")),
            ("client down", lambda plain=plain: client(get, plain)),
        ]
        pairs = (acts[:2], acts[2:])
        for name, act in (act for pair in pairs for act in (pair if number % 2 else pair[::-1])):
            timed(name, act)
        for folder in ("back", "plain"):
            shutil.rmtree(scratch / folder)
    table = Table(title=f"{len(files):,} files, {size / 1e6:,.0f} MB; {_link(options)}")
    for column in ("", "MB/s", "÷ client"):
        table.add_column(column, justify="right" if column else "left")
    for name, speeds in done.items():
        beside = done[name.replace("copy", "client")]
        ratio = [ours / theirs for ours, theirs in zip(speeds, beside, strict=True)]
        told = with_interval(ratio) if "copy" in name else ""
        table.add_row(name, f"{statistics.median(speeds):,.0f}", told)
    return table


def _title(cache: Cache, loss: Loss, options: argparse.Namespace) -> str:
    size = sum(f.bytes for unit in cache.manifest.parts[0].units for f in unit.files.values())
    student = (
        f"a device of {options.device_rows:g} rows/s"
        if options.device_rows
        else f"2 layers of {options.width}"
    )
    return (
        f"{options.units} units of {options.unit_rows} rows of {cache.manifest.sequence_length}, "
        f"{size / 1e6:,.0f} MB; tail = {loss.tail}; {options.rows} rows an update, {student}; "
        f"{_link(options)}"
    )


def _link(options: argparse.Namespace) -> str:
    return f"{options.megabytes:g} MB/s, {options.milliseconds:g} ms; {options.rounds} rounds"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", nargs="?", default="runs/cache")
    parser.add_argument("--units", type=int, default=32)
    parser.add_argument("--unit-rows", type=int, default=256)
    parser.add_argument("--shuffle", nargs="+", default=["global", "blocks"])
    parser.add_argument("--rows", type=int, default=16, help="rows of an update")
    parser.add_argument("--width", type=int, default=64, help="of the student")
    parser.add_argument("--device-rows", type=float, help="rows a second of a device elsewhere")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--milliseconds", type=float, default=20.0)
    parser.add_argument("--copy", action="store_true")
    parser.add_argument("--scratch", type=Path, help="folder for caches, mirrors and the bucket")
    return parser.parse_args()


if __name__ == "__main__":
    main()
