"""ArrayRecord files done safely.

A file is closed, reopened and counted before it gets its name. ArrayRecord itself neither raises on
a missing file nor finishes one without close().
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

# group_size:1 so that one row can be read without inflating its neighbours; the payloads are
# already compressed.
_WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclass(frozen=True)
class FileEntry:
    """What is known of a committed file: its size in bytes, sha256 and number of records."""

    bytes: int
    sha256: str
    records: int


def write_records(path: Path, records: Sequence[bytes], *, kind: steps.File = "other") -> FileEntry:
    """Write one ArrayRecord file, reopen and count it, and give it its name."""
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
    """Random access to records of many files through a bounded number of open ones.

    ArrayRecord keeps a descriptor a file and never gives it back; a cache has thousands.
    """

    def __init__(self, *, capacity: int = 64):
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._capacity = capacity

    def read(self, path: Path, indices: Sequence[int], *, expected: FileEntry) -> list[bytes]:
        """The records at `indices` of `path`. ValueError if the file is not what was committed."""
        reader = self._reader(path, expected)
        try:
            # read([i]) scans every chunk header of the file; read(i, i + 1) does not.
            return [reader.read(i, i + 1)[0] for i in indices]
        except RuntimeError as error:  # what its own checksums find, told without the file's name
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
    """ValueError unless `path` exists with the committed size; hashes are `verify`'s job."""
    if not path.is_file():
        raise ValueError(f"{path}: the manifest names this file, but it is missing")
    if path.stat().st_size != expected.bytes:
        raise ValueError(
            f"{path}: expected {expected.bytes} bytes, got {path.stat().st_size}; it is damaged"
        )
