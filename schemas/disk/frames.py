"""The byte layout of one record: a header, then one block per field with its codec's id.

    magic "DCNT" · version u8 · kind u8 · blocks u16 · crc32 of all the rest u32
    row_key 16 bytes · positions u32
    blocks × (field u8 · codec u8 · length u32) · payloads

All integers are little-endian. A new field or codec gets a new id; this layout never changes.
"""

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

VERSION = 1
MAGIC = b"DCNT"
_HEAD = struct.Struct("<4sBBH")
_CRC = struct.Struct("<I")
_START = _HEAD.size + _CRC.size
_ROW = struct.Struct("<16sI")
_BLOCK = struct.Struct("<BBI")


class Kind(IntEnum):
    """The kinds of records."""

    ROW = 1
    LOGITS = 2
    COUNTS = 3
    SKETCH = 4


class Block(NamedTuple):
    """One encoded field of one record. The meaning of a (field, codec) pair never changes."""

    field: int
    codec: int
    payload: bytes


@dataclass(frozen=True)
class Frame:
    """One record: the key of its row, the row's length S (`positions`), and the encoded fields."""

    kind: Kind
    row_key: bytes
    positions: int
    blocks: tuple[Block, ...]

    def block(self, field: int, *, where: str) -> Block:
        """The block of `field`. ValueError that begins with `where` if the record has none."""
        for block in self.blocks:
            if block.field == field:
                return block
        raise ValueError(f"{where}: the record has no field {field}")

    def pack(self) -> bytes:
        """The record's bytes."""
        body = b"".join(
            [
                _ROW.pack(self.row_key, self.positions),
                *(_BLOCK.pack(b.field, b.codec, len(b.payload)) for b in self.blocks),
                *(b.payload for b in self.blocks),
            ]
        )
        head = _HEAD.pack(MAGIC, VERSION, self.kind, len(self.blocks))
        return head + _CRC.pack(_checksum(head, body)) + body


def unpack(data: bytes, *, kind: Kind, where: str) -> Frame:
    """The frame of a record of this `kind`.

    ValueError that begins with `where` if `data` is truncated, altered, of another kind or version.
    """
    if len(data) < _START + _ROW.size:
        raise ValueError(f"{where}: record of {len(data)} bytes is truncated")
    magic, version, stored_kind, count = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise ValueError(f"{where}: not a record of this format (begins with {magic!r})")
    if version != VERSION:
        raise ValueError(
            f"{where}: record version {version}, but this release reads version {VERSION}; "
            "read it with the release that wrote it or a newer one"
        )
    (checksum,) = _CRC.unpack_from(data, _HEAD.size)
    if _checksum(data[: _HEAD.size], memoryview(data)[_START:]) != checksum:
        raise ValueError(f"{where}: checksum mismatch, the record is damaged")
    if stored_kind != kind:
        raise ValueError(f"{where}: expected a {kind.name} record, got kind {stored_kind}")
    row_key, positions = _ROW.unpack_from(data, _START)
    return Frame(kind, row_key, positions, _unpack_blocks(data, count, where=where))


def _checksum(head: bytes, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(head))


def _unpack_blocks(data: bytes, count: int, *, where: str) -> tuple[Block, ...]:
    table = _START + _ROW.size
    start = table + count * _BLOCK.size
    if start > len(data):
        raise ValueError(f"{where}: record of {len(data)} bytes is truncated")
    blocks = []
    for i in range(count):
        field, codec, length = _BLOCK.unpack_from(data, table + i * _BLOCK.size)
        blocks.append(Block(field, codec, data[start : start + length]))
        start += length
    if start != len(data):
        raise ValueError(f"{where}: record has {len(data)} bytes, its blocks need {start}")
    return tuple(blocks)


def require_same_key(row: bytes, signal: bytes, *, where: str) -> None:
    """Check that a signal's record carries the key of its row. ValueError if records were swapped.

    `row` and `signal` are the two 16-byte keys.
    """
    if row != signal:
        raise ValueError(
            f"{where}: this record belongs to row {signal.hex()[:12]}, but the row stored at its "
            f"place is {row.hex()[:12]}; files or records were swapped"
        )
