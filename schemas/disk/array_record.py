"""ArrayRecord files: written atomically and checked, read by record number.

The writer closes, reopens and counts a file before it renames it to its final name. ArrayRecord
itself raises no error for a missing file and leaves a file unfinished without close().
"""

import dataclasses
import hashlib
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# The binding is a compiled module without type information.
from array_record.python import array_record_module  # pyright: ignore

from decant.schemas.disk import steps
from decant.schemas.disk.atomic import replacing
from decant.schemas.disk.identity import file_sha256
from decant.schemas.disk.record_file import Bytes, LocalBytes, RecordFile
from decant.schemas.disk.stand_in import again_if_damaged, bucket_of, named_in
from decant.store.mirror import Mirror
from decant.store.mirrored_file import MirroredFile, pieces_of, wait_for

# group_size:1 so that one row can be read without decompressing its neighbours. Uncompressed,
# because the payloads are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_FIRST, _LAST = 4 << 10, 128 << 10
"""Bytes of a file in its fingerprint: its first record, and the blocks of its index."""
_MOST_INDEX_BYTES = 64 << 20


@dataclass(frozen=True)
class FileEntry:
    """A committed file: its size in bytes, sha256 and number of records."""

    bytes: int
    sha256: str
    records: int
    fingerprint: str = field(default="", compare=False)
    """`fingerprint_of` the file; empty for arrays, and in caches of 0.7 and before."""


def as_json(value: Any) -> dict[str, Any]:
    """`dataclasses.asdict(value)`, without fields that are newer than the format and empty: older
    caches keep their bytes."""

    def without_empty(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        newer = (
            ("fingerprint", ""),
            ("unwritten", {}),
            ("writers", {}),
            ("group", ""),
            ("weights", {}),
            ("labels", False),
            ("mass", None),
            ("asked_rank", None),
            ("coded_with", None),
        )
        return {name: value for name, value in fields if (name, value) not in newer}

    return dataclasses.asdict(value, dict_factory=without_empty)


def fingerprint_of(path: Path) -> str:
    """16 hex digits of a sha256 over a file's size, its first 4 KiB and its last 128 KiB.

    No two files of a cache share it. The first record of a file of rows names its document; the
    first of a file of logits, its row. The last blocks list the size of every record.
    """
    return _fingerprint(LocalBytes(path))


def _fingerprint(contents: Bytes) -> str:
    size = contents.size
    summary = hashlib.sha256(size.to_bytes(8, "little"))
    for begin, end in _identifying(size):
        summary.update(contents.read(begin, end))
    return summary.hexdigest()[:16]


def _identifying(size: int) -> list[tuple[int, int]]:
    """The (begin, end) ranges of a file that its fingerprint covers. Its index is in the last."""
    return [(0, min(_FIRST, size)), (max(size - _LAST, 0), size)]


def write_records(path: Path, records: Sequence[bytes], *, kind: steps.File = "other") -> FileEntry:
    """Write one ArrayRecord file, reopen and count it, then rename it to `path`.

    `kind` names the file's steps for tests that kill the writer. OSError if the count is wrong.
    """
    with replacing(path, kind=kind) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
        for record in records:
            writer.write(record)
        writer.close()
        count = _count(temporary)
        if count != len(records):
            raise OSError(
                f"{path}: wrote {len(records)} records, read back {count}; is the disk full?"
            )
        return FileEntry(
            temporary.stat().st_size,
            file_sha256(temporary),
            len(records),
            fingerprint_of(temporary),
        )


def _count(path: Path) -> int:
    try:
        return len(RecordFile(path))
    except ValueError:
        return 0


class RecordReaders:
    """Random access to the records of many files, with at most `capacity` files open.

    An open file holds a descriptor until it is closed, one in a mirror two, and a cache has
    thousands of files. Threads may share it: one that fetches ahead opens the files that another
    reads.
    """

    def __init__(self, *, capacity: int | None = None, mirror: Mirror | None = None):
        """`mirror` fetches what is read of the files, which lie in it. Unset: they are here.

        `capacity` unset: an eighth of the descriptors that the process may have.
        """
        self._open: OrderedDict[Path, RecordFile] = OrderedDict()
        self._capacity, self._mirror = capacity or _files_at_once(), mirror
        self._checked: set[Path] = set()
        self._indexes: OrderedDict[Path, np.ndarray] = OrderedDict()
        self._index_bytes = 0
        self._lock = threading.Lock()

    def read(self, path: Path, indices: Sequence[int], *, expected: FileEntry) -> list[bytes]:
        """The records of `path` at `indices`. ValueError if the file differs from `expected`."""
        if not bucket_of(path):
            file = self._file(path, expected)
            return [file.read(i) for i in indices]

        def read() -> list[bytes]:
            file = self._file(path, expected)
            # By few requests, not one a record.
            wait_for(_data_of(path, expected).start(file.extents(indices)))
            return [file.read(i) for i in indices]

        return again_if_damaged(read, lambda: self.forget(path, expected))

    def start(
        self, path: Path, indices: Sequence[int], *, expected: FileEntry, in_pieces: bool = False
    ) -> list[Future]:
        """Begin to fetch these records into the mirror; returns the requests to wait for.

        `in_pieces`: with the records around them, which one request brings.
        """
        file = self._file(path, expected)
        if not isinstance(file.contents, MirroredFile):
            return []
        ranges = file.extents(indices)
        if in_pieces:
            ranges = list(dict.fromkeys(piece for span in ranges for piece in pieces_of(*span)))
        return file.contents.start(ranges)

    def is_known(self, path: Path) -> bool:
        """Whether the file was opened before, so that opening it again reads nothing."""
        return path in self._open or path in self._indexes

    def forget(self, path: Path, expected: FileEntry) -> None:
        """Fetch the file again when it is read next."""
        if self._mirror is not None:
            self._mirrored(path, expected).forget()
        elif bucket_of(path):
            _data_of(path, expected).forget()
        with self._lock:
            self._open.pop(path, None)
            self._checked.discard(path)
            self._index_bytes -= len(self._indexes.pop(path, b"")) * 8

    def _mirrored(self, path: Path, expected: FileEntry) -> MirroredFile:
        assert self._mirror is not None
        named = named_in(self._mirror, path, expected.sha256)
        return self._mirror.file(path, expected.bytes, named=named)

    def _file(self, path: Path, expected: FileEntry) -> RecordFile:
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
                return self._open[path]
            offsets = self._indexes.get(path)
        file = self._opened(path, expected, offsets)
        if len(file) != expected.records:
            raise ValueError(
                f"{path}: expected {expected.records} records, got {len(file)}; the file is damaged"
            )
        with self._lock:
            self._checked.add(path)
            self._open[path] = file
            if len(self._open) > self._capacity:
                self._open.popitem(last=False)
            self._remember(path, file.offsets)
        return file

    def _remember(self, path: Path, offsets: np.ndarray) -> None:
        """Keep a file's index longer than its descriptor: a cache has more files than may be open,
        and reading an index takes as long as reading several records."""
        if path not in self._indexes:
            self._index_bytes += len(offsets) * 8
        self._indexes[path] = offsets
        self._indexes.move_to_end(path)
        while self._index_bytes > _MOST_INDEX_BYTES:
            _, dropped = self._indexes.popitem(last=False)
            self._index_bytes -= len(dropped) * 8

    def _opened(self, path: Path, expected: FileEntry, offsets: np.ndarray | None) -> RecordFile:
        if self._mirror is None and not bucket_of(path):
            require_file(path, expected, whole=path not in self._checked)
            return RecordFile(path, offsets=offsets)
        contents = self._mirrored(path, expected) if self._mirror else _data_of(path, expected)
        if offsets is not None:
            return RecordFile(path, contents, offsets=offsets)
        with contents.held():
            contents.ensure(_identifying(expected.bytes))
            if path not in self._checked:
                _require_fingerprint(path, contents, expected)
            return RecordFile(path, contents)


def _data_of(path: Path, expected: FileEntry) -> MirroredFile:
    bucket = bucket_of(path)
    assert bucket is not None
    return bucket.data(path, sha256=expected.sha256, size=expected.bytes)


def _files_at_once() -> int:
    """How many files a cache holds open: on some systems a process may have only 256."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(max(most // 8, 32), 1024)


def require_file(path: Path, expected: FileEntry, *, whole: bool = True) -> None:
    """ValueError unless `path` exists with the committed size and, if `whole`, fingerprint.

    Only `verify` checks hashes. An object is named by its hash, so its size is enough.
    """
    if bucket := bucket_of(path):
        size = bucket.size(path, expected.sha256)
        if size != expected.bytes:
            raise ValueError(f"{path}: expected an object of {expected.bytes} bytes, got {size}")
        return
    if not path.is_file():
        raise ValueError(f"{path}: the manifest names this file, but it is missing")
    if path.stat().st_size != expected.bytes:
        raise ValueError(
            f"{path}: expected {expected.bytes} bytes, got {path.stat().st_size}; it is damaged"
        )
    if whole and expected.fingerprint:
        _require_fingerprint(path, LocalBytes(path), expected)


def _require_fingerprint(path: Path, contents: Bytes, expected: FileEntry) -> None:
    if expected.fingerprint and (got := _fingerprint(contents)) != expected.fingerprint:
        raise ValueError(
            f"{path}: expected fingerprint {expected.fingerprint}, got {got}; it is damaged, or "
            "was exchanged for another file"
        )
