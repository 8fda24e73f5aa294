"""One file of an array (a zarr3 shard): its entry in a commit, and the check against that entry.

A shard holds its inner chunks, each ending in a crc32c, then an index of their offsets and lengths,
which also ends in a crc32c. These checksums find flipped bits, but not a shard that was swapped for
another. A hash of the index and the chunks' checksums identifies the content; computing it reads
only 20 bytes per chunk.
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
    """A committed file: name inside the array's directory, size in bytes, and two hashes."""

    name: str
    bytes: int
    sha256: str
    fingerprint: str
    """sha256 of the index and of every inner chunk's crc32c."""


def describe_shard(name: str, data: bytes, *, chunks: int) -> Shard:
    """The commit's entry for a file called `name` with contents `data` of `chunks` inner chunks."""

    def read(count: int, at: int) -> bytes:
        return data[at : at + count]

    fingerprint = _fingerprint(read, size=len(data), chunks=chunks)
    return Shard(name, len(data), hashlib.sha256(data).hexdigest(), fingerprint)


def require_shard(
    path: Path, expected: Shard, *, chunks: int, of: str, blosc_bytes: int | None = None
) -> None:
    """Check that `path` is the committed file. ValueError naming `of` and the file if it is not.

    `chunks` is the number of inner chunks. Flipped bits inside a chunk are not found here, but by
    the chunk's checksum whenever it is read. `blosc_bytes` is the size of an uncompressed chunk if
    Blosc compressed it: Blosc allocates what a chunk claims to hold. zstd is read as a stream.
    """
    try:
        with path.open("rb") as file:
            descriptor = file.fileno()
            size = os.fstat(descriptor).st_size
            fingerprint = _fingerprint(
                lambda count, at: os.pread(descriptor, count, at), size=size, chunks=chunks
            )
            claimed = _blosc_claims(descriptor, size, chunks) if blosc_bytes else 0
    except OSError as error:
        raise ValueError(f"{path}: {of} was committed with this file, but {error}") from error
    if size != expected.bytes:
        raise ValueError(
            f"{path}: {of}: expected {expected.bytes} bytes, got {size}; the file is damaged"
        )
    if fingerprint != expected.fingerprint:
        raise ValueError(
            f"{path}: {of}: not the file that was committed: its index or checksums differ; "
            "it was damaged, or swapped for another shard"
        )
    if blosc_bytes and claimed > blosc_bytes:
        raise ValueError(
            f"{path}: {of}: a chunk claims {claimed} bytes where {blosc_bytes} are expected"
        )


def _blosc_claims(descriptor: int, size: int, chunks: int) -> int:
    """The most bytes that a chunk claims to hold, in bytes 4 to 8 of its Blosc header."""
    index_bytes = chunks * _ENTRY_BYTES + _CRC_BYTES
    index = os.pread(descriptor, index_bytes, max(size - index_bytes, 0))
    starts = np.frombuffer(index, "<u8", count=len(index) // 8)[::2].tolist()
    heads = [os.pread(descriptor, 4, start + 4) for start in starts if start < size]
    return max((int.from_bytes(head, "little") for head in heads), default=0)


def _fingerprint(read: Callable[[int, int], bytes], *, size: int, chunks: int) -> str:
    """Fingerprint of a file of `size` bytes. `read(count, at)` gives `count` bytes from `at`."""
    index_bytes = chunks * _ENTRY_BYTES + _CRC_BYTES
    if size < index_bytes:
        return "too short for its index"
    index = read(index_bytes, size - index_bytes)
    entries = np.frombuffer(index, "<u8", count=2 * chunks).reshape(-1, 2)
    summary = hashlib.sha256(index)
    # A damaged index may point anywhere; its own bytes already changed the hash.
    for end in (entries[:, 0] + entries[:, 1]).tolist():
        if _CRC_BYTES <= end <= size:
            summary.update(read(_CRC_BYTES, end - _CRC_BYTES))
    return summary.hexdigest()
