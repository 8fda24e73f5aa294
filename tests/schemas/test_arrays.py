import dataclasses
import hashlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorstore

from schemas import array_io
from schemas.array_io import ArrayReader, ArrayWriter
from schemas.arrays import (
    CHUNK_BYTES,
    METADATA,
    SHARD_BYTES,
    ArraySpec,
    create,
    metadata,
    shard_rows,
    specs_of,
)
from schemas.shards import Shard
from schemas.signals import AttentionSignal, HiddenSignal

UNIT_ROWS = 16
DTYPES = ("bfloat16", "float32", "int8", "uint8")


def spec_of(dtype: str = "bfloat16", *, row=(6, 5), rows_a_file: int = 4, slots: int = 64):
    return ArraySpec((slots, *row), dtype, rows_a_file)


def some_rows(spec: ArraySpec, count: int, *, seed: int = 0) -> np.ndarray:
    """Random bytes: every bit pattern of the type, NaNs too."""
    generator = np.random.default_rng(seed)
    itemsize = spec.numpy_dtype.itemsize
    shape = (count, *spec.row[:-1], spec.row[-1] * itemsize)
    return generator.integers(0, 256, shape, dtype=np.uint8).view(spec.numpy_dtype)


def write(path: Path, spec: ArraySpec, rows, *, unit: int = 0) -> tuple[Shard, ...]:
    create(path, spec)
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
    """sha256 of each file that has its name, by name."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.iterdir())
        if file.suffix != ".tmp"
    }


# -- what comes back


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_come_back_bit_for_bit_in_the_order_asked(tmp_path, dtype):
    spec = spec_of(dtype)
    rows = some_rows(spec, 11)
    shards = write(tmp_path, spec, rows)
    order = [10, 0, 3, 3, 7]
    assert same_bits(reader(tmp_path, spec, shards).read(order), rows[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_and_of_the_fill_value_are_data_like_any_other(tmp_path, dtype):
    spec = spec_of(dtype)
    rows = np.zeros((4, *spec.row), spec.numpy_dtype)
    if dtype in ("bfloat16", "float32"):
        rows[1] = np.nan
    shards = write(tmp_path, spec, rows)
    assert same_bits(reader(tmp_path, spec, shards).read(range(4)), rows)


def test_rows_can_be_read_into_slots_of_an_array_that_is_there(tmp_path):
    spec = spec_of()
    rows = some_rows(spec, 4)
    out = np.zeros((6, *spec.row), spec.numpy_dtype)
    reader(tmp_path, spec, write(tmp_path, spec, rows)).read_into(out, [5, 2], [1, 3])
    assert same_bits(out[[5, 2]], rows[[1, 3]])
    assert not out[[0, 1, 3, 4]].view(np.uint16).any()


def test_a_short_unit_leaves_holes_that_are_no_files(tmp_path):
    spec = spec_of()
    first, second = some_rows(spec, 5), some_rows(spec, 16, seed=1)
    units = write(tmp_path, spec, first), write(tmp_path, spec, second, unit=1)
    assert [shard.name for shard in units[0]] == ["c.0.0.0", "c.1.0.0"]
    assert [shard.name for shard in units[1]] == [f"c.{n}.0.0" for n in (4, 5, 6, 7)]
    assert set(digests(tmp_path)) == {METADATA, *(s.name for unit in units for s in unit)}
    got = reader(tmp_path, spec, *units).read([4, 16, 31])
    assert same_bits(got, np.stack([first[4], second[0], second[15]]))


def test_what_a_last_file_lacks_is_written_as_zeros_not_as_what_came_before(tmp_path):
    spec = spec_of()
    long, short = write(tmp_path, spec, some_rows(spec, 11)), some_rows(spec, 9)
    full = np.concatenate([short[8:], np.zeros((3, *spec.row), spec.numpy_dtype)])
    shards = write(tmp_path, spec, short)
    assert shards[2] != long[2]
    assert same_bits(reader(tmp_path, spec, shards).read(range(8, 12)), full)


def test_a_row_larger_than_a_file_is_split_over_several(tmp_path, monkeypatch):
    monkeypatch.setattr("schemas.arrays.SHARD_BYTES", 200)
    monkeypatch.setattr("schemas.arrays.CHUNK_BYTES", 40)
    assert shard_rows((6, 8, 8), "uint8", unit_rows=16) == 1
    spec = ArraySpec((16, 6, 8, 8), "uint8", 1)
    assert (spec.shard, spec.chunk) == ((1, 3, 8, 8), (1, 1, 4, 8))
    rows = some_rows(spec, 2)
    shards = write(tmp_path, spec, rows)
    assert [s.name for s in shards] == ["c.0.0.0.0", "c.0.1.0.0", "c.1.0.0.0", "c.1.1.0.0"]
    assert same_bits(reader(tmp_path, spec, shards).read([1, 0]), rows[::-1])
    flip(tmp_path / "c.1.1.0.0", 100)
    with pytest.raises(ValueError, match=r"unit 0.*row 1 .*c\.1\.1\.0\.0"):
        reader(tmp_path, spec, shards).read([0, 1])


# -- its shape on disk


def test_files_hold_a_power_of_two_of_rows_within_a_unit_and_the_limit():
    hidden = (1024, 576)  # 1.125 MiB in bfloat16: 28 fit in 32 MiB
    assert shard_rows(hidden, "bfloat16", unit_rows=4096) == 16
    assert shard_rows(hidden, "bfloat16", unit_rows=8) == 8
    assert shard_rows(hidden, "int8", unit_rows=4096) == 32
    assert shard_rows((1024,), "float32", unit_rows=4096) == 4096
    assert shard_rows((9, 1024, 1024), "uint8", unit_rows=4096) == 2
    assert shard_rows((32, 2048, 2048), "uint8", unit_rows=4096) == 1
    assert shard_rows((4, 4), "uint8", unit_rows=1) == 1


@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        ((1024, 576), "bfloat16"),
        ((2048, 8192), "bfloat16"),
        ((9, 1024, 1024), "uint8"),
        ((32, 4096, 4096), "uint8"),
        ((3, 16384, 16384), "bfloat16"),
        ((1000,), "float32"),
    ],
)
def test_chunks_divide_files_and_files_divide_rows(row, dtype):
    spec = ArraySpec((4096, *row), dtype, shard_rows(row, dtype, unit_rows=4096))
    itemsize = spec.numpy_dtype.itemsize
    assert math.prod(spec.shard) * itemsize <= SHARD_BYTES
    assert math.prod(spec.chunk) * itemsize <= CHUNK_BYTES
    for whole, part in ((spec.shape, spec.shard), (spec.shard, spec.chunk)):
        assert all(n % m == 0 for n, m in zip(whole, part, strict=True))
    assert spec.chunk[-1] == row[-1]
    count = math.prod(n // m for n, m in zip(spec.row, spec.shard[1:], strict=True))
    assert len(spec.shard_names(3)) == count


def test_each_signal_has_its_arrays():
    hidden = HiddenSignal("s", "t", 12, "int8", width=6, teacher_width=8, shard_rows=4)
    assert specs_of(hidden, name="hidden/12", slots=32, sequence_length=10) == {
        "hidden/12": ArraySpec((32, 10, 6), "int8", 4),
        "hidden/12-scale": ArraySpec((32, 10), "float32", 4),
    }
    plain = dataclasses.replace(hidden, dtype="bfloat16")
    assert specs_of(plain, name="hidden/12", slots=32, sequence_length=10) == {
        "hidden/12": ArraySpec((32, 10, 6), "bfloat16", 4)
    }
    maps = AttentionSignal("s", "t", 3, "uint8-log", heads=(0, 2), teacher_heads=4, shard_rows=2)
    assert specs_of(maps, name="attention/3", slots=32, sequence_length=10) == {
        "attention/3": ArraySpec((32, 2, 10, 10), "uint8", 2)
    }
    mean = dataclasses.replace(maps, dtype="bfloat16", heads="mean")
    assert specs_of(mean, name="attention/3", slots=32, sequence_length=10) == {
        "attention/3": ArraySpec((32, 1, 10, 10), "bfloat16", 2)
    }


def test_any_zarr3_reader_can_open_the_array(tmp_path):
    spec = spec_of("float32")
    rows = some_rows(spec, 4)
    write(tmp_path, spec, rows)
    where = {"driver": "file", "path": f"{tmp_path}/"}
    array = tensorstore.open({"driver": "zarr3", "kvstore": where}, open=True).result()
    assert same_bits(array[:4].read().result(), rows)
    assert array.shape == (64, 6, 5)
    assert np.isnan(array[4:8].read().result()).all()  # the fill value of what is not there
    inner = json.loads((tmp_path / METADATA).read_text())["codecs"][0]["configuration"]
    assert inner["codecs"][-1]["name"] == inner["index_codecs"][-1]["name"] == "crc32c"


def test_integers_are_filled_with_zero():
    assert [metadata(spec_of(dtype))["fill_value"] for dtype in DTYPES] == ["NaN", "NaN", 0, 0]


# -- the same bytes


def test_the_bytes_depend_on_the_rows_alone(tmp_path, monkeypatch):
    spec = spec_of(row=(64, 96))
    rows = some_rows(spec, 11)
    wide = np.repeat(rows, 2, axis=-1)[..., ::2]
    patterns = {"plain": rows, "strided": wide, "list": [row.copy() for row in rows]}
    for name, pattern in patterns.items():
        write(tmp_path / name, spec, pattern)
    write(tmp_path / "plain", spec, rows)  # once more, over itself
    for threads in (1, 7):
        limits = {name: {"limit": threads} for name in ("data_copy_concurrency", IO)}
        pools = {name: {} for name in ("cache_pool", "cache_pool#indices")}
        context = tensorstore.Context({**limits, **pools})
        monkeypatch.setattr(array_io, "_context", lambda context=context: context)
        write(tmp_path / f"{threads} threads", spec, rows)
    expected, *others = [digests(path) for path in sorted(tmp_path.iterdir())]
    assert len(expected) == 4
    assert all(other == expected for other in others)
    assert len(others) == 4


IO = "file_io_concurrency"

WRITE = """
import sys
from pathlib import Path
import numpy as np
from schemas.array_io import ArrayWriter
from schemas.arrays import ArraySpec, create

path = Path(sys.argv[1])
spec = ArraySpec((64, 1024, 1024), "uint8", 4)
generator = np.random.default_rng(0)
rows = [generator.integers(0, 256, spec.row, dtype=np.uint8) for _ in range(4)]
create(path, spec)
writer = ArrayWriter(path, spec, first=0)
for n in range(14):
    writer.append(rows[n % 4] + np.uint8(n))
writer.finish()
"""


def start(program: str, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root})


def test_two_processes_that_write_the_same_unit_leave_the_same_bytes(tmp_path):
    together = [start(WRITE, tmp_path / "both") for _ in range(2)]
    alone = start(WRITE, tmp_path / "one")
    assert [process.wait() for process in (*together, alone)] == [0, 0, 0]
    assert digests(tmp_path / "both") == digests(tmp_path / "one")
    assert len(digests(tmp_path / "one")) == 5


def test_killed_in_mid_write_and_rerun_the_array_has_the_same_bytes(tmp_path):
    assert start(WRITE, tmp_path / "whole").wait() == 0
    path = tmp_path / "killed"
    for name in ("c.0.0.0", "c.2.0.0"):
        process = start(WRITE, path)
        while process.poll() is None and not list(path.glob(f".{name}.*.tmp")):
            time.sleep(0.0002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert digests(path) != digests(tmp_path / "whole")
    assert start(WRITE, path).wait() == 0
    assert digests(path) == digests(tmp_path / "whole")


def test_a_damaged_predecessor_is_replaced_unread(tmp_path):
    spec = spec_of()
    rows = some_rows(spec, 5)
    expected = write(tmp_path, spec, rows), digests(tmp_path)
    for name in ("c.0.0.0", "c.1.0.0", METADATA):
        (tmp_path / name).write_bytes(b"half of something else, and longer than it" * 99)
    assert (write(tmp_path, spec, rows), digests(tmp_path)) == expected


# -- strict reading


def flip(file: Path, at: int, *, bit: int = 0) -> None:
    """In place, as a disk would; twice is not at all."""
    with file.open("r+b") as f:
        f.seek(at)
        (byte,) = f.read(1)
        f.seek(at)
        f.write(bytes([byte ^ 1 << bit]))


def error_of(path: Path, spec: ArraySpec, shards, *, rows=range(4)) -> str:
    with pytest.raises(ValueError, match="hidden/12") as caught:
        reader(path, spec, shards).read(rows)
    return str(caught.value)


@pytest.fixture
def array(tmp_path):
    """Two files of four rows, and what the commit says of them."""
    spec = spec_of()
    rows = some_rows(spec, 8)
    return tmp_path, spec, rows, write(tmp_path, spec, rows)


def test_a_deleted_file_is_an_error_that_names_array_unit_and_file(array):
    path, spec, rows, shards = array
    (path / "c.1.0.0").unlink()
    assert same_bits(reader(path, spec, shards).read([3]), rows[[3]])
    message = error_of(path, spec, shards, rows=[3, 5])
    assert str(path / "c.1.0.0") in message
    assert "hidden/12, unit 0" in message


def test_a_file_deleted_between_reads_is_an_error_not_the_fill_value(array):
    path, spec, _, shards = array
    rows = reader(path, spec, shards)
    rows.read([5])
    (path / "c.1.0.0").unlink()
    with pytest.raises(ValueError, match=r"hidden/12, unit 0, row 6 .*c\.1\.0\.0"):
        rows.read([6])


@pytest.mark.parametrize("kept", [0, 3, 100, -1])
def test_a_truncated_file_is_an_error(array, kept):
    path, spec, _, shards = array
    file = path / "c.0.0.0"
    file.write_bytes(file.read_bytes()[:kept])
    assert str(file) in error_of(path, spec, shards)


def test_a_file_the_commit_does_not_know_is_an_error(array):
    path, spec, _, shards = array
    assert "c.1.0.0" in error_of(path, spec, shards[:1], rows=[4])


def test_swapped_files_of_one_array_are_found_before_anything_is_read(array):
    path, spec, _, shards = array
    a, b = path / "c.0.0.0", path / "c.1.0.0"
    assert a.stat().st_size == b.stat().st_size
    a.rename(path / "aside"), b.rename(a), (path / "aside").rename(b)
    assert str(a) in error_of(path, spec, shards, rows=[0])
    assert str(b) in error_of(path, spec, shards, rows=[7])


def test_the_file_of_another_array_is_found(array, tmp_path):
    path, spec, _, shards = array
    write(tmp_path / "other", spec, some_rows(spec, 4, seed=1))
    (tmp_path / "other" / "c.0.0.0").rename(path / "c.0.0.0")
    assert "not the file that was committed" in error_of(path, spec, shards)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_flipped_byte_of_a_file_goes_unnoticed(tmp_path, dtype):
    spec = spec_of(dtype, row=(3, 2), rows_a_file=2)
    rows = some_rows(spec, 2)
    shards = write(tmp_path, spec, rows)
    file = tmp_path / "c.0.0.0"
    for at in range(file.stat().st_size):
        flip(file, at, bit=at % 8)
        message = error_of(tmp_path, spec, shards, rows=[0, 1])
        assert str(file) in message
        assert "hidden/12, unit 0" in message
        flip(file, at, bit=at % 8)
    assert same_bits(reader(tmp_path, spec, shards).read([0, 1]), rows)


def test_a_flipped_byte_concerns_its_own_row_only(array):
    path, spec, rows, shards = array
    flip(path / "c.0.0.0", 10)  # in the first row's chunk
    assert same_bits(reader(path, spec, shards).read([1, 2, 3]), rows[1:4])
    assert "row 0 of it" in error_of(path, spec, shards, rows=[3, 0, 1])


def test_damage_after_a_first_read_is_found_because_rows_are_not_kept(array):
    path, spec, rows, shards = array
    opened = reader(path, spec, shards)
    assert same_bits(opened.read([0]), rows[:1])
    file = path / "c.0.0.0"
    times = file.stat()
    flip(file, 10)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_ino == times.st_ino
    with pytest.raises(ValueError, match=r"hidden/12, unit 0, row 0"):
        opened.read([0])


def test_no_flipped_byte_of_the_metadata_goes_unnoticed(array):
    path, spec, _, shards = array
    file = path / METADATA
    for at in range(file.stat().st_size):
        flip(file, at, bit=at % 8)
        assert str(file) in error_of(path, spec, shards)
        flip(file, at, bit=at % 8)
    reader(path, spec, shards).read(range(8))
    file.unlink()
    assert "missing" in error_of(path, spec, shards)


def test_a_row_of_another_shape_or_type_is_refused_when_written(tmp_path):
    spec = spec_of()
    create(tmp_path, spec)
    writer = ArrayWriter(tmp_path, spec, first=0)
    for wrong in (np.zeros((1, 5), spec.numpy_dtype), np.zeros(spec.row, np.float32)):
        with pytest.raises(ValueError, match=r"expected a row of bfloat16 \(6, 5\), got"):
            writer.append(wrong)


# -- what a process keeps

MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
from pathlib import Path
import numpy as np
from schemas.array_io import ArrayReader, ArrayWriter
from schemas.arrays import ArraySpec, create

path = Path(sys.argv[1])
spec = ArraySpec((128, 16), "uint8", 1)
create(path, spec)
rows = np.arange(128 * 16, dtype=np.uint32).reshape(128, 16).astype(np.uint8)
writer = ArrayWriter(path, spec, first=0)
for row in rows:
    writer.append(row)
shards = writer.finish()
readers = [
    ArrayReader(path, spec, name="n", unit_rows=128, committed=lambda unit: shards)
    for _ in range(60)
]
for reader in readers:
    assert (reader.read(np.arange(128)) == rows).all()
"""


def test_files_are_open_only_while_they_are_read(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 40
    assert start(MANY, tmp_path).wait() == 0


def test_a_row_costs_one_read_once_its_files_index_is_known(array):
    path, spec, _, shards = array
    opened = reader(path, spec, shards)
    opened.read(range(8))
    before = file_reads()
    opened.read([5, 2, 0, 7])
    assert file_reads() - before == 4


def test_writing_reads_nothing(tmp_path):
    spec = spec_of()
    before = file_reads()
    for _ in range(2):
        write(tmp_path, spec, some_rows(spec, 11))
    assert file_reads() == before


def file_reads() -> int:
    name = "/tensorstore/kvstore/file/read"
    metrics = tensorstore.experimental_collect_matching_metrics(name)
    return sum(m["values"][0]["value"] for m in metrics if m["name"] == name)
