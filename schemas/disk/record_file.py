"""Read the records of one ArrayRecord file, as `array_record.py` writes them.

    blocks of 64 KiB, each with a header of 24 bytes, which the layout below leaves out
    a chunk per record, then the index, padding to a whole block, and the postscript's block
    chunk: header hash u64 · data bytes u64 · data hash u64 · type u8 · records u56 · sizes' sum u64
    its data: compression u8 (0: none) · bytes of sizes varint · sizes varint… · the records

The postscript says where the index begins; the index, where each chunk begins. The library's reader
allocates whatever a chunk claims and ends the process if it cannot. A chunk here may claim no more
than its own bytes. The library's hashes are not checked, as every record has a checksum of its own.
"""

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, UInt8

_BLOCK = 1 << 16
_BLOCK_HEADER = 24
_HEADER = struct.Struct("<QQQQQ")
_FIRST_CHUNK = 64
_RECORDS = ord("r")
_OFFSET_TAG = 8
"""Before each offset in the index and the postscript: field 1 of a protocol buffer, an integer."""
_LONGEST_VARINT = 9


@runtime_checkable
class Bytes(Protocol):
    """The bytes of an open file, on this machine or in a mirror of a bucket."""

    size: int

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`."""
        ...


class LocalBytes:
    """A file on this machine, closed when dropped."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # Not a file object: one that is dropped open warns. `close` is bound, because `os` may be
        # gone when an interpreter ends with a cache open.
        if hasattr(self, "_descriptor"):
            close(self._descriptor)

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`."""
        return os.pread(self._descriptor, end - begin, begin)


class RecordFile:
    """An open file. ValueError naming the file if its index is damaged."""

    def __init__(
        self, path: Path, contents: Bytes | None = None, *, offsets: np.ndarray | None = None
    ):
        """`contents` are those of the file `path`; unset, it is opened.

        `offsets` are those that the file had when it was open before; unset, its index is read.
        """
        self._path = path
        self.contents = LocalBytes(path) if contents is None else contents
        self.offsets = self._read_index(self.contents.size) if offsets is None else offsets
        """Where each record begins, then where the last one ends."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def extents(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """Where the bytes of each of these records begin and end."""
        return [(int(self.offsets[n]), int(self.offsets[n + 1])) for n in numbers if n < len(self)]

    def read(self, number: int) -> bytes:
        """The record with this number. ValueError naming the file if its chunk is damaged."""
        if number >= len(self):
            raise self._damaged(f"it has {len(self)} records and none of number {number}")
        begin, end = self.offsets[number : number + 2].tolist()
        count, sizes, record = self._chunk(begin, end)
        if count != 1 or self._varint(sizes, 0) != (len(record), len(sizes)):
            raise self._damaged(f"record {number} has not the size that its chunk says")
        return bytes(record)

    def _read_index(self, size: int) -> Int64[np.ndarray, " records_and_one"]:
        """Where each chunk begins, then where the index does."""
        if size < 2 * _BLOCK or size % _BLOCK:
            raise self._damaged(f"{size} bytes are no such file")
        _, _, postscript = self._chunk(size - _BLOCK, size, padded=True)
        index, _ = self._varint(postscript, 1)
        if postscript[0] != _OFFSET_TAG or not _FIRST_CHUNK <= index < size - _BLOCK:
            raise self._damaged("its postscript is not one")
        count, encoded, entries = self._chunk(index, size - _BLOCK, padded=True)
        sizes = self._sizes(encoded)
        if len(sizes) != count or sizes.sum() != len(entries):
            raise self._damaged("its index contradicts itself")
        # The first entry describes the file. Every other one begins with the chunk's offset.
        offsets = self._offsets_in(np.frombuffer(entries, np.uint8), np.cumsum(sizes)[:-1])
        offsets = np.append(offsets, index)
        if offsets[0] < _FIRST_CHUNK or (np.diff(offsets) <= 0).any():
            raise self._damaged("its index is out of order")
        return offsets

    def _chunk(
        self, begin: int, end: int, *, padded: bool = False
    ) -> tuple[int, memoryview, memoryview]:
        """The number of a chunk's records, their sizes as varints, and their bytes.

        `padded`: padding follows the chunk up to `end`.
        """
        raw = self._without_block_headers(begin, end)
        if len(raw) < _HEADER.size:
            raise self._damaged(f"its chunk at {begin} is cut off")
        _, length, _, kind, total = _HEADER.unpack_from(raw)
        data = memoryview(raw)[_HEADER.size : _HEADER.size + length]
        if len(data) != length or (len(raw) > _HEADER.size + length and not padded):
            raise self._damaged(f"its chunk at {begin} has another length")
        if kind & 255 != _RECORDS or data[:1] != b"\0":
            raise self._damaged(f"its chunk at {begin} holds no plain records")
        bytes_of_sizes, at = self._varint(data, 1)
        values = data[at + bytes_of_sizes :]
        if len(values) != total:
            raise self._damaged(f"its chunk at {begin} contradicts itself")
        return kind >> 8, data[at : at + bytes_of_sizes], values

    def _without_block_headers(self, begin: int, end: int) -> bytes:
        raw = self.contents.read(begin, end)
        first = -begin % _BLOCK  # the first block header, from `begin`
        if first >= len(raw):
            return raw
        pieces = [raw[:first]]
        for at in range(first, len(raw), _BLOCK):
            pieces.append(raw[at + _BLOCK_HEADER : at + _BLOCK])
        return b"".join(pieces)

    def _varint(self, data: memoryview, at: int) -> tuple[int, int]:
        """The integer at `at`, and where it ends."""
        value = 0
        for place, byte in enumerate(data[at : at + _LONGEST_VARINT]):
            value |= (byte & 127) << 7 * place
            if byte < 128:
                return value, at + place + 1
        raise self._damaged("an integer in it does not end")

    def _sizes(self, data: memoryview) -> Int64[np.ndarray, " records"]:
        octets = np.frombuffer(data, np.uint8)
        if octets.max(initial=0) < 128:
            return octets.astype(np.int64)
        sizes, at = [], 0
        while at < len(data):
            size, at = self._varint(data, at)
            sizes.append(size)
        return np.array(sizes, np.int64)

    def _offsets_in(
        self, octets: UInt8[np.ndarray, " bytes"], starts: Int64[np.ndarray, " records"]
    ) -> Int64[np.ndarray, " records"]:
        """The integer after the tag at each of `starts`."""
        if (octets.take(starts, mode="clip") != _OFFSET_TAG).any():
            raise self._damaged("its index is not one")
        offsets, more = np.zeros(len(starts), np.int64), np.ones(len(starts), bool)
        for place in range(_LONGEST_VARINT):
            byte = octets.take(starts + 1 + place, mode="clip").astype(np.int64)
            offsets += np.where(more, (byte & 127) << 7 * place, 0)
            more &= byte >= 128
            if not more.any():
                return offsets
        raise self._damaged("an integer in its index does not end")

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self._path}: {what}; the file is damaged")
