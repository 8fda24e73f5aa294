"""One file of an array: what a commit remembers of it, and checking that it is still that file.

A zarr3 shard holds its inner chunks, each ending in its own crc32c, and then an index of their
offsets and lengths, which ends in one too. Those checksums find flipped bits but not another
shard in this one's place; the index and the chunks' checksums together identify the content, at
the price of reading 20 bytes a chunk.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_CRC_BYTES = 4
_ENTRY_BYTES = 16
"""Offset and length of one inner chunk, each little-endian uint64."""


@dataclass(frozen=True)
class Shard:
    """A committed file: its name in the array's directory, its size in bytes, what is in it."""

    name: str
    bytes: int
    sha256: str
    fingerprint: str
    """sha256 of the index and of every inner chunk's crc32c."""


def describe_shard(name: str, data: bytes, *, chunks: int) -> Shard:
    """What a commit says of the file called `name` that holds `data`, `chunks` inner chunks."""

    def read(count: int, at: int) -> bytes:
        return data[at : at + count]

    fingerprint = _fingerprint(read, size=len(data), chunks=chunks)
    return Shard(name, len(data), hashlib.sha256(data).hexdigest(), fingerprint)


def require_shard(path: Path, expected: Shard, *, chunks: int, of: str) -> None:
    """ValueError naming `of` and the file unless it is the committed one, short of flipped bits.

    What is flipped inside a chunk is found by the chunk's own checksum, whenever it is read.
    """
    try:
        with path.open("rb") as file:
            descriptor = file.fileno()
            size = os.fstat(descriptor).st_size
            found = _fingerprint(
                lambda count, at: os.pread(descriptor, count, at), size=size, chunks=chunks
            )
    except OSError as error:
        raise ValueError(f"{path}: {of} was committed with this file, but {error}") from error
    if size != expected.bytes:
        raise ValueError(
            f"{path}: {of}: expected {expected.bytes} bytes, got {size}; the file is damaged"
        )
    if found != expected.fingerprint:
        raise ValueError(
            f"{path}: {of}: not the file that was committed: its index or checksums are others; "
            "it was damaged, or another shard was put in its place"
        )


def _fingerprint(read: Callable[[int, int], bytes], *, size: int, chunks: int) -> str:
    """Of a file of `size` bytes, of which `read(count, at)` gives some."""
    index_bytes = chunks * _ENTRY_BYTES + _CRC_BYTES
    if size < index_bytes:
        return "too short for its index"
    index = read(index_bytes, size - index_bytes)
    entries = np.frombuffer(index, "<u8", count=2 * chunks).reshape(-1, 2)
    summary = hashlib.sha256(index)
    # A damaged index may point anywhere; it is another one already.
    for end in (entries[:, 0] + entries[:, 1]).tolist():
        if _CRC_BYTES <= end <= size:
            summary.update(read(_CRC_BYTES, end - _CRC_BYTES))
    return summary.hexdigest()
