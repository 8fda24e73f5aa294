"""ArrayRecord files: written atomically and checked, read by record number.

The writer closes, reopens and counts a file before it renames it to its final name. ArrayRecord
itself raises no error for a missing file and leaves a file unfinished without close().
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The binding is a compiled module without type information.
from array_record.python import array_record_module  # pyright: ignore

from decant.schemas.disk import steps
from decant.schemas.disk.atomic import replacing
from decant.schemas.disk.identity import file_sha256

# group_size:1 so that one row can be read without decompressing its neighbours. Uncompressed,
# because the payloads are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclass(frozen=True)
class FileEntry:
    """A committed file: its size in bytes, sha256 and number of records."""

    bytes: int
    sha256: str
    records: int


def write_records(path: Path, records: Sequence[bytes], *, kind: steps.File = "other") -> FileEntry:
    """Write one ArrayRecord file, reopen and count it, then rename it to `path`.

    `kind` names the file's steps for tests that kill the writer. OSError if the count is wrong.
    """
    with replacing(path, kind=kind) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
        for record in records:
            writer.write(record)
        writer.close()
        reader = array_record_module.ArrayRecordReader(str(temporary))
        if not reader.ok() or reader.num_records() != len(records):
            raise OSError(
                f"{path}: wrote {len(records)} records, read back {reader.num_records()}; "
                "is the disk full?"
            )
        reader.close()
        return FileEntry(temporary.stat().st_size, file_sha256(temporary), len(records))


class RecordReaders:
    """Random access to the records of many files, with at most `capacity` files open.

    An open ArrayRecord file holds a descriptor until it is closed, and a cache has thousands of
    files.
    """

    def __init__(self, *, capacity: int = 64):
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._capacity = capacity

    def read(self, path: Path, indices: Sequence[int], *, expected: FileEntry) -> list[bytes]:
        """The records of `path` at `indices`. ValueError if the file differs from `expected`."""
        reader = self._reader(path, expected)
        try:
            # read([i]) scans every chunk header of the file; read(i, i + 1) does not.
            return [reader.read(i, i + 1)[0] for i in indices]
        except RuntimeError as error:  # ArrayRecord's checksum errors do not name the file
            raise ValueError(f"{path}: {error}; the file is damaged") from error

    def _reader(self, path: Path, expected: FileEntry) -> Any:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        require_file(path, expected)
        reader = array_record_module.ArrayRecordReader(
            str(path), "readahead_buffer_size:0,max_parallelism:0"
        )
        if not reader.ok() or reader.num_records() != expected.records:
            raise ValueError(
                f"{path}: expected {expected.records} records, got {reader.num_records()}; "
                "the file is damaged"
            )
        self._open[path] = reader
        if len(self._open) > self._capacity:
            self._open.popitem(last=False)[1].close()
        return reader


def require_file(path: Path, expected: FileEntry) -> None:
    """ValueError unless `path` exists with the committed size. Only `verify` checks hashes."""
    if not path.is_file():
        raise ValueError(f"{path}: the manifest names this file, but it is missing")
    if path.stat().st_size != expected.bytes:
        raise ValueError(
            f"{path}: expected {expected.bytes} bytes, got {path.stat().st_size}; it is damaged"
        )
