"""Small arrays of rows for tests: write, read, compare and damage them."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np

from decant.schemas.arrays.reader import ArrayReader
from decant.schemas.arrays.spec import ArraySpec, create_array
from decant.schemas.arrays.writer import ArrayWriter
from decant.schemas.disk.shards import Shard
from tests.paths import environment

UNIT_ROWS = 16
DTYPES = ("bfloat16", "float32", "int8", "uint8")


def spec_of(dtype: str = "bfloat16", *, row=(6, 5), rows_a_file: int = 4, slots: int = 64):
    return ArraySpec((slots, *row), dtype, rows_a_file)


def some_rows(spec: ArraySpec, count: int, *, seed: int = 0) -> np.ndarray:
    """Rows of random bytes: any bit pattern of the type, NaN included."""
    generator = np.random.default_rng(seed)
    itemsize = spec.numpy_dtype.itemsize
    shape = (count, *spec.row[:-1], spec.row[-1] * itemsize)
    return generator.integers(0, 256, shape, dtype=np.uint8).view(spec.numpy_dtype)


def write(path: Path, spec: ArraySpec, rows, *, unit: int = 0) -> tuple[Shard, ...]:
    create_array(path, spec)
    writer = ArrayWriter(path, spec, first=unit * UNIT_ROWS)
    for row in rows:
        writer.append(row)
    return writer.finish()


def reader(path: Path, spec: ArraySpec, *units: tuple[Shard, ...]) -> ArrayReader:
    return ArrayReader(
        path, spec, name="hidden/12", unit_rows=UNIT_ROWS, committed=lambda unit: units[unit]
    )


def same_bits(got: np.ndarray, expected: np.ndarray) -> bool:
    return (
        got.shape == expected.shape
        and got.dtype == expected.dtype
        and got.tobytes() == expected.tobytes()
    )


def digests(path: Path) -> dict[str, str]:
    """sha256 of each finished file, by name."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.iterdir())
        if file.suffix != ".tmp"
    }


def flip(file: Path, at: int, *, bit: int = 0) -> None:
    """Flip one bit of a file in place; a second call restores it."""
    with file.open("r+b") as f:
        f.seek(at)
        (byte,) = f.read(1)
        f.seek(at)
        f.write(bytes([byte ^ 1 << bit]))


def start(program: str, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, env=environment())
