"""Arrays on disk: their files, and that their bytes depend only on the rows."""

import dataclasses
import json
import math
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tensorstore

from decant.schemas.arrays import reader as array_reader
from decant.schemas.arrays import writer
from decant.schemas.arrays.spec import (
    CHUNK_BYTES,
    METADATA,
    SHARD_BYTES,
    ArraySpec,
    metadata,
    shard_rows,
    specs_of,
)
from decant.schemas.signals import AttentionSignal, HiddenSignal
from tests.making.arrays import (
    DTYPES,
    digests,
    flip,
    reader,
    same_bits,
    some_rows,
    spec_of,
    start,
    write,
)


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


def test_rows_can_be_read_into_slots_of_an_existing_array(tmp_path):
    spec = spec_of()
    rows = some_rows(spec, 4)
    out = np.zeros((6, *spec.row), spec.numpy_dtype)
    reader(tmp_path, spec, write(tmp_path, spec, rows)).start(out, [5, 2], [1, 3])()
    assert same_bits(out[[5, 2]], rows[[1, 3]])
    assert not out[[0, 1, 3, 4]].view(np.uint16).any()


def test_rows_beyond_the_read_limit_are_read_after_earlier_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(array_reader, "_READ_BYTES", 2 * 6 * 5 * 2)  # two rows
    spec = spec_of()
    rows = some_rows(spec, 8)
    opened = reader(tmp_path, spec, write(tmp_path, spec, rows))
    out = np.zeros((8, *spec.row), spec.numpy_dtype)
    finish = opened.start(out, range(8), range(8))
    time.sleep(0.2)
    assert not out[2:].view(np.uint16).any()
    finish()
    assert same_bits(out, rows)
    flip(tmp_path / "c.1.0.0", 10)
    with pytest.raises(ValueError, match=r"hidden/12, unit 0, row 4"):
        opened.read(range(8))


def test_the_unused_slots_of_a_short_unit_take_no_files(tmp_path):
    spec = spec_of()
    first, second = some_rows(spec, 5), some_rows(spec, 16, seed=1)
    units = write(tmp_path, spec, first), write(tmp_path, spec, second, unit=1)
    assert [shard.name for shard in units[0]] == ["c.0.0.0", "c.1.0.0"]
    assert [shard.name for shard in units[1]] == [f"c.{n}.0.0" for n in (4, 5, 6, 7)]
    assert set(digests(tmp_path)) == {METADATA, *(s.name for unit in units for s in unit)}
    got = reader(tmp_path, spec, *units).read([4, 16, 31])
    assert same_bits(got, np.stack([first[4], second[0], second[15]]))


def test_unused_slots_of_a_last_file_are_zeros_not_earlier_rows(tmp_path):
    spec = spec_of()
    long, short = write(tmp_path, spec, some_rows(spec, 11)), some_rows(spec, 9)
    full = np.concatenate([short[8:], np.zeros((3, *spec.row), spec.numpy_dtype)])
    shards = write(tmp_path, spec, short)
    assert shards[2] != long[2]
    assert same_bits(reader(tmp_path, spec, shards).read(range(8, 12)), full)


def test_a_row_larger_than_a_file_is_split_over_several(tmp_path, monkeypatch):
    monkeypatch.setattr("decant.schemas.arrays.spec.SHARD_BYTES", 200)
    monkeypatch.setattr("decant.schemas.arrays.spec.CHUNK_BYTES", 40)
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


def test_the_metadata_is_all_that_a_zarr3_reader_needs(tmp_path):
    spec = spec_of("float32")
    rows = some_rows(spec, 4)
    write(tmp_path, spec, rows)
    where = {"driver": "file", "path": f"{tmp_path}/"}
    array = tensorstore.open({"driver": "zarr3", "kvstore": where}, open=True).result()
    assert same_bits(array[:4].read().result(), rows)
    assert array.shape == (64, 6, 5)
    assert np.isnan(array[4:8].read().result()).all()  # missing rows read as the fill value
    inner = json.loads((tmp_path / METADATA).read_text())["codecs"][0]["configuration"]
    assert inner["codecs"][-1]["name"] == inner["index_codecs"][-1]["name"] == "crc32c"


def test_the_fill_value_of_integers_is_zero():
    assert [metadata(spec_of(dtype))["fill_value"] for dtype in DTYPES] == ["NaN", "NaN", 0, 0]


def test_the_bytes_depend_on_the_rows_alone(tmp_path, monkeypatch):
    spec = spec_of(row=(64, 96))
    rows = some_rows(spec, 11)
    wide = np.repeat(rows, 2, axis=-1)[..., ::2]
    patterns = {"plain": rows, "strided": wide, "list": [row.copy() for row in rows]}
    for name, pattern in patterns.items():
        write(tmp_path / name, spec, pattern)
    write(tmp_path / "plain", spec, rows)  # once more, over itself
    for threads in (1, 7):
        limits = {
            name: {"limit": threads} for name in ("data_copy_concurrency", "file_io_concurrency")
        }
        pools = {name: {} for name in ("cache_pool", "cache_pool#indices")}
        context = tensorstore.Context({**limits, **pools})
        monkeypatch.setattr(writer, "shared_context", lambda context=context: context)
        write(tmp_path / f"{threads} threads", spec, rows)
    expected, *others = [digests(path) for path in sorted(tmp_path.iterdir())]
    assert len(expected) == 4
    assert all(other == expected for other in others)
    assert len(others) == 4


WRITE = """
import sys
from pathlib import Path
import numpy as np
from decant.schemas.arrays.writer import ArrayWriter
from decant.schemas.arrays.spec import ArraySpec, create_array

path = Path(sys.argv[1])
spec = ArraySpec((64, 1024, 1024), "uint8", 4)
generator = np.random.default_rng(0)
rows = [generator.integers(0, 256, spec.row, dtype=np.uint8) for _ in range(4)]
create_array(path, spec)
writer = ArrayWriter(path, spec, first=0)
for n in range(14):
    writer.append(rows[n % 4] + np.uint8(n))
writer.finish()
"""


def test_two_processes_that_write_the_same_unit_leave_the_same_bytes(tmp_path):
    together = [start(WRITE, tmp_path / "both") for _ in range(2)]
    alone = start(WRITE, tmp_path / "one")
    assert [process.wait() for process in (*together, alone)] == [0, 0, 0]
    assert digests(tmp_path / "both") == digests(tmp_path / "one")
    assert len(digests(tmp_path / "one")) == 5


def killed_in_mid_write(path: Path, *, after: int) -> bool:
    """Kill a writer during a file, after at least `after` files; False if it finished first."""
    before = half_written(path)
    process = start(WRITE, path)
    while process.poll() is None:
        if half_written(path) - before and len(list(path.glob("c.*"))) >= after:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.0002)
    process.wait()
    return bool(half_written(path) - before)


def half_written(path: Path) -> set[Path]:
    return set(path.glob(".c.*.tmp"))


def test_killed_in_mid_write_and_rerun_the_array_has_the_same_bytes(tmp_path):
    assert start(WRITE, tmp_path / "whole").wait() == 0
    whole, path = digests(tmp_path / "whole"), tmp_path / "killed"
    for after in (0, 2):
        assert any(killed_in_mid_write(path, after=after) for _ in range(9))
        assert all(whole[name] == digest for name, digest in digests(path).items())
    assert start(WRITE, path).wait() == 0
    assert digests(path) == whole


def test_a_damaged_predecessor_is_replaced_unread(tmp_path):
    spec = spec_of()
    rows = some_rows(spec, 5)
    expected = write(tmp_path, spec, rows), digests(tmp_path)
    for name in ("c.0.0.0", "c.1.0.0", METADATA):
        (tmp_path / name).write_bytes(b"half of something else, and longer than it" * 99)
    assert (write(tmp_path, spec, rows), digests(tmp_path)) == expected
