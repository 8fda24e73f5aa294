"""Reading arrays is strict: damage is an error. A process keeps no rows and no open files."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest
import tensorstore

from decant.schemas.arrays.spec import METADATA, ArraySpec, create_array
from decant.schemas.arrays.writer import ArrayWriter
from decant.schemas.disk.shards import describe_shard
from tests.making.arrays import DTYPES, flip, reader, same_bits, some_rows, spec_of, start, write


def error_of(path: Path, spec: ArraySpec, shards, *, rows=range(4)) -> str:
    with pytest.raises(ValueError, match="hidden/12") as caught:
        reader(path, spec, shards).read(rows)
    return str(caught.value)


@pytest.fixture
def array(tmp_path):
    """Two files of four rows, and their entries in the commit."""
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
    os.truncate(file, kept % file.stat().st_size)
    message = error_of(path, spec, shards)
    assert f"{file}: " in message
    assert f"expected {shards[0].bytes} bytes, got {file.stat().st_size}" in message


def test_a_damaged_row_is_an_error_on_every_read(array):
    path, spec, rows, shards = array
    (path / "c.1.0.0").unlink()
    opened = reader(path, spec, shards)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"c\.1\.0\.0: hidden/12, unit 0.* was committed"):
            opened.read([0, 4])
    assert same_bits(opened.read([0]), rows[:1])


def test_errors_number_units_and_the_rows_in_them(tmp_path):
    spec = spec_of()
    units = [write(tmp_path, spec, some_rows(spec, 8), unit=unit) for unit in range(2)]
    flip(tmp_path / "c.5.0.0", 10)
    with pytest.raises(ValueError, match=r"hidden/12, unit 1, row 4 of it .*c\.5\.0\.0"):
        reader(tmp_path, spec, *units).read([0, 20])


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
    size = file.stat().st_size
    index = size - (2 * 16 + 4)
    for at in range(size):
        flip(file, at, bit=at % 8)
        message = error_of(tmp_path, spec, shards, rows=[0, 1])
        assert str(file) in message
        assert "hidden/12, unit 0" in message
        assert at < index or "not the file that was committed" in message
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
    create_array(tmp_path, spec)
    writer = ArrayWriter(tmp_path, spec, first=0)
    for wrong in (np.zeros((1, 5), spec.numpy_dtype), np.zeros(spec.row, np.float32)):
        with pytest.raises(ValueError, match=r"expected a row of bfloat16 \(6, 5\), got"):
            writer.append(wrong)


MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))
from pathlib import Path
import numpy as np
from decant.schemas.arrays.reader import ArrayReader
from decant.schemas.arrays.writer import ArrayWriter
from decant.schemas.arrays.spec import ArraySpec, create_array

path = Path(sys.argv[1])
spec = ArraySpec((128, 16), "uint8", 1)
create_array(path, spec)
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
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 96
    assert start(MANY, tmp_path).wait() == 0


def test_a_row_costs_one_read_once_the_index_of_its_file_is_cached(array):
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


def test_a_chunk_that_claims_more_than_it_holds_is_refused_before_it_is_read(tmp_path):
    spec = spec_of("bfloat16")
    (shard,) = write(tmp_path, spec, some_rows(spec, 4))
    file, claimed = tmp_path / shard.name, 2**31 - 100
    data = bytearray(file.read_bytes())
    data[4:8] = claimed.to_bytes(4, "little")  # in the first chunk's Blosc header
    file.write_bytes(data)
    forged = describe_shard(shard.name, bytes(data), chunks=spec.chunks_per_shard)
    with pytest.raises(ValueError, match=rf"c\.0\.0\.0: .*unit 0.* claims {claimed} bytes"):
        reader(tmp_path, spec, (forged,)).read([0])
