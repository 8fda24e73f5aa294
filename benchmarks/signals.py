"""Speed of reading random rows of each signal from the page cache, and the signal's disk space.

    python -m benchmarks.signals CACHE [--rows 32] [--turns 20]
    python -m benchmarks.signals --synthetic

With CACHE: each of its signals alone, logits with what a student at T = 1 and at T = 4 reads, and
those of T = 1 with each layer of hidden states, through `Cache.read` as the trainer calls it (codes
are decoded on the device). With `--synthetic`: random
hidden states and attention maps of the embedded teacher's shape, through `ArrayReader`. All are
measured alternately, `--rows` rows a turn; times are medians. GB/s count the returned bytes. Disk
space is compared with a plain bfloat16 array of the same numbers; for logits, of whole
distributions.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from decant.schemas import open_cache
from decant.schemas.arrays.reader import ArrayReader
from decant.schemas.arrays.spec import ArraySpec, create_array, shard_rows
from decant.schemas.arrays.writer import ArrayWriter
from decant.schemas.reading.cache import Cache
from decant.schemas.reading.held import held_by, loss_targets
from decant.schemas.signals import CountsSignal, HiddenSignal, LogitsSignal, SketchSignal
from decant.schemas.targets.attention import encode_log
from decant.schemas.targets.hidden import encode_int8
from decant.trainer.loss.choice import choose_tail
from decant.trainer.loss.settings import Loss

LENGTH, WIDTH, HEADS = 1024, 576, 9
"""Shape of synthetic rows, that of SmolLM2-135M."""


@dataclass
class Subject:
    """One line of the table: a reader and the sizes of what it reads."""

    name: str
    row_numbers: np.ndarray
    length: int
    """Positions in a row."""
    read: Callable[[np.ndarray], Sequence[np.ndarray]]
    disk_bytes: float
    """Bytes a position of all files."""
    plain_bytes: float
    """Bytes a position if every number were stored in bfloat16."""


def main():
    options = _arguments()
    with tempfile.TemporaryDirectory() as directory:
        subjects = (
            list(synthetic(Path(directory)))
            if options.synthetic
            else list(of_cache(open_cache(options.cache)))
        )
        table = Table("signal", "rows/s", "GB/s", "disk B/position", "of plain bfloat16")
        for subject, (seconds, size) in zip(
            subjects, measure(subjects, rows=options.rows, turns=options.turns), strict=True
        ):
            table.add_row(
                subject.name,
                f"{options.rows / seconds:,.0f}",
                f"{size / seconds / 1e9:.2f}",
                f"{subject.disk_bytes:,.0f}",
                f"{subject.disk_bytes / subject.plain_bytes:.3f}",
            )
        Console().print(table)
        print(f"Rows of {subjects[0].length} positions, {options.rows} at a time, at random.")


def measure(subjects: list[Subject], *, rows: int, turns: int) -> list[tuple[float, int]]:
    """For each subject, median seconds of one read of `rows` rows, and the bytes it returns."""
    generator = np.random.default_rng(0)
    seconds: list[list[float]] = [[] for _ in subjects]
    sizes = [0] * len(subjects)
    for subject in subjects:  # Checks the files and fills the page cache.
        subject.read(subject.row_numbers)
    for _ in range(turns):
        for i, subject in enumerate(subjects):
            chosen = generator.choice(subject.row_numbers, rows)
            start = time.perf_counter()
            arrays = subject.read(chosen)
            seconds[i].append(time.perf_counter() - start)
            sizes[i] = sum(array.nbytes for array in arrays)
    return [(statistics.median(s), size) for s, size in zip(seconds, sizes, strict=True)]


def of_cache(cache: Cache) -> Iterator[Subject]:
    """A subject for each signal, for what students read, and for this with each hidden layer."""
    signals = cache.manifest.signals
    hidden = [name for name, signal in signals.items() if isinstance(signal, HiddenSignal)]
    kinds: list[tuple[str, tuple[str, ...], Collection[str] | None]] = []
    kinds += [(name, (name,), () if name == "logits" else None) for name in signals]
    kinds.append(("logits and all targets", ("logits",), None))
    for temperature in (1.0, 4.0):
        loss, _ = choose_tail(Loss(temperature=temperature), held_by([cache]))
        read = loss_targets(loss.tail)
        kinds.append((f"logits + {loss.tail} (T = {temperature:g})", ("logits",), read))
        if temperature == 1:
            with_states = [(f"the same + {name}", ("logits", name), read) for name in hidden]
            kinds += with_states
    for title, names, targets in kinds:
        read = cache.targets if targets is None else targets
        stored = {*names, *(name for name in read if name in signals and "logits" in names)}
        yield Subject(
            title,
            cache.rows(),
            cache.manifest.sequence_length,
            lambda rows, names=names, targets=targets: list(
                cache.read(rows, names, decode=False, targets=targets).values()
            ),
            disk_bytes=sum(_disk_bytes(cache, name) for name in stored),
            plain_bytes=sum(_plain_bytes(cache, name) for name in names),
        )


def _disk_bytes(cache: Cache, name: str) -> float:
    units = [unit for part in cache.manifest.parts for unit in part.units]
    return sum(u.files[name].bytes for u in units) / len(cache) / cache.manifest.sequence_length


def _plain_bytes(cache: Cache, name: str) -> float:
    signal = cache.manifest.signals[name]
    if isinstance(signal, LogitsSignal | CountsSignal | SketchSignal):
        return 2.0 * cache.manifest.vocabulary_size
    if isinstance(signal, HiddenSignal):
        return 2.0 * signal.teacher_width
    return 2.0 * signal.stored_heads * cache.manifest.sequence_length


def synthetic(directory: Path) -> Iterator[Subject]:
    """A subject for each kind of array: 64 rows of states, 16 rows of maps."""
    generator = np.random.default_rng(0)
    # A few channels are much larger than others, as in real states.
    scales = np.exp(generator.normal(size=WIDTH))
    states = (generator.normal(size=(64, LENGTH, WIDTH)) * scales).astype(np.float32)
    codes, scale = encode_int8(states)
    logits = 3 * generator.normal(size=(16, HEADS, LENGTH, LENGTH)).astype(np.float32)
    weights = np.tril(np.exp(logits))
    maps = encode_log(weights / weights.sum(-1, keepdims=True))
    kinds = {
        "hidden bfloat16": ({"": states.astype(ml_dtypes.bfloat16)}, 2.0 * WIDTH),
        "hidden int8": ({"": codes, "-scale": scale}, 2.0 * WIDTH),
        "attention uint8-log": ({"": maps}, 2.0 * HEADS * LENGTH),
    }
    for name, (arrays, plain) in kinds.items():
        stored = [_store(directory / f"{name}{part}", rows) for part, rows in arrays.items()]
        readers = [reader for reader, _ in stored]
        count = len(arrays[""])
        yield Subject(
            name,
            np.arange(count),
            LENGTH,
            lambda rows, readers=readers: [reader.read(rows) for reader in readers],
            disk_bytes=sum(size for _, size in stored) / count / LENGTH,
            plain_bytes=plain,
        )


def _store(path: Path, rows: np.ndarray) -> tuple[ArrayReader, int]:
    """A reader of the array that holds `rows`, and its bytes on disk."""
    dtype, unit_rows = str(rows.dtype), len(rows)
    spec = ArraySpec(rows.shape, dtype, shard_rows(rows.shape[1:], dtype, unit_rows=unit_rows))
    create_array(path, spec)
    writer = ArrayWriter(path, spec, first=0)
    for row in rows:
        writer.append(row)
    shards = writer.finish()
    reader = ArrayReader(
        path, spec, name=path.name, unit_rows=unit_rows, committed=lambda unit: shards
    )
    return reader, sum(shard.bytes for shard in shards)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cache", nargs="?", default="runs/cache", help="a sealed cache")
    parser.add_argument("--synthetic", action="store_true", help="random arrays instead of a cache")
    parser.add_argument("--rows", type=int, default=32, help="rows read at once")
    parser.add_argument("--turns", type=int, default=20, help="reads of each signal")
    return parser.parse_args()


if __name__ == "__main__":
    main()
