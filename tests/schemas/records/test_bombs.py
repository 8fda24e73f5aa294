"""A small file that claims gigabytes is an error before anything is allocated."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from array_record.python import array_record_module  # pyright: ignore

from decant.schemas.disk.array_record import FileEntry, write_records
from decant.schemas.disk.frames import Kind, unpack
from decant.schemas.records.rows import Segment, build_row, encode_row
from tests.paths import environment

CLAIMED = 1 << 31
READ = """
import resource, sys
from pathlib import Path
from decant.schemas.disk.array_record import FileEntry, RecordReaders
from decant.schemas.records.rows import decode_row

path = Path(sys.argv[1])
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    (record,) = RecordReaders().read(path, [0], expected=FileEntry(path.stat().st_size, "", 1))
    decode_row(record, where="record 0", length=64)
except ValueError as error:
    print(error)
"""


def bomb() -> bytes:
    """A zstd frame of CLAIMED zeros."""
    packer = zstandard.ZstdCompressor().compressobj(size=CLAIMED)
    piece = bytes(1 << 24)
    return b"".join([packer.compress(piece) for _ in range(CLAIMED >> 24)]) + packer.flush()


def row_with_a_bomb(path: Path) -> FileEntry:
    tokens = np.arange(9, dtype=np.int32)
    record = encode_row(build_row([Segment(tokens, tokens > 0, 0, 0, 0)], length=64))
    frame = unpack(record, kind=Kind.ROW, where="")
    blocks = tuple(b._replace(payload=bomb()) if b.field == 1 else b for b in frame.blocks)
    return write_records(path, [dataclasses.replace(frame, blocks=blocks).pack()])


def compressed_records(path: Path) -> None:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,zstd")
    writer.write(bytes(1 << 28))
    writer.close()


@pytest.mark.parametrize(
    ("make", "error"),
    [(row_with_a_bomb, f"expected 128 bytes, got {CLAIMED}"), (compressed_records, "is damaged")],
)
def test_a_bomb_is_an_error_in_little_memory(make, error, tmp_path):
    path = tmp_path / "unit-00000.array_record"
    make(path)
    assert path.stat().st_size < 1 << 19
    command = [sys.executable, "-c", READ, str(path)]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert error in run.stdout
