"""One file of an array: what a commit remembers of it, and checking that it is still that file.

A zarr3 shard holds its inner chunks, each ending in its own crc32c, and then an index of their
offsets and lengths, which ends in one too. Those checksums find flipped bits but not another
shard in this one's place; the index and the chunks' checksums together identify the content, at
the price of reading 20 bytes a chunk.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schemas.identity import file_sha256

CRC_BYTES = 4
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


def describe(path: Path, *, chunks: int) -> Shard:
    """What a commit says of the file just written, of `chunks` inner chunks."""
    return Shard(
        path.name, path.stat().st_size, file_sha256(path), _fingerprint(path, chunks=chunks)
    )


def require_shard(path: Path, expected: Shard, *, chunks: int, of: str) -> None:
    """ValueError naming `of` and the file unless it is the committed one, short of flipped bits.

    What is flipped inside a chunk is found by the chunk's own checksum, whenever it is read.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path}: {of} was committed with this file, but {error}") from error
    if size != expected.bytes:
        raise ValueError(
            f"{path}: {of}: expected {expected.bytes} bytes, got {size}; the file is damaged"
        )
    if _fingerprint(path, chunks=chunks) != expected.fingerprint:
        raise ValueError(
            f"{path}: {of}: not the file that was committed: its index or checksums are others; "
            "it was damaged, or another shard was put in its place"
        )


def _fingerprint(path: Path, *, chunks: int) -> str:
    with path.open("rb") as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        index_bytes = chunks * _ENTRY_BYTES + CRC_BYTES
        index = os.pread(descriptor, index_bytes, max(size - index_bytes, 0))
        summary = hashlib.sha256(index)
        if len(index) == index_bytes:
            entries = np.frombuffer(index, "<u8", count=2 * chunks).reshape(-1, 2)
            # Sums of a damaged index wrap round, and point out of the file or at other bytes.
            ends = (entries[:, 0] + entries[:, 1]).tolist()
            for end in ends:
                if CRC_BYTES <= end <= size:
                    summary.update(os.pread(descriptor, CRC_BYTES, end - CRC_BYTES))
    return summary.hexdigest()
