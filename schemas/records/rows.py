"""What one training row means: tokens, segments, positions, and which position has a target.

This module owns the shift: **position t is scored against token t + 1**, and `loss_mask[t]`
says whether it is. Nobody else moves anything by one.
"""

import hashlib
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

from decant.schemas.disk.frames import Block, Frame, Kind, unpack

_TOKENS, _SEGMENTS, _MASK, _ORIGINS = 1, 2, 3, 4
_RAW, _ZSTD_U16, _ZSTD_U32 = 0, 1, 2
PADDING = 0
"""Segment id of padding; its token id is 0 as well and it is never scored."""


class _Zstd(threading.local):
    """Made once a thread: to make one takes as long as the rest of a row."""

    def __init__(self):
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()


@dataclass(frozen=True)
class Segment:
    """A piece of one document inside a row, and where it came from.

    `tokens` int32 [n]; `counted` bool [n]: whether the token is learned from (all of a text).
    `source` numbers the part's sources; `document` is the byte offset of the document in it (in a
    table, the number of records before it);
    `start` is the piece's first token counted from the document's first.
    """

    tokens: np.ndarray
    counted: np.ndarray
    source: int
    document: int
    start: int


@dataclass(frozen=True)
class Row:
    """One training sequence of S positions.

    `tokens`, `segment_ids` (from 1; 0 is padding), `positions` (restart per segment) int32 [S];
    `loss_mask` bool [S]; `origins` int64 [segments, 3]: source, document, start.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray
    origins: np.ndarray

    @property
    def key(self) -> bytes:
        """First 16 bytes of sha256(tokens, segment_ids, loss_mask): the row's identity."""
        digest = hashlib.sha256()
        digest.update(self.tokens.astype("<i4").tobytes())
        digest.update(self.segment_ids.astype("<i4").tobytes())
        digest.update(np.packbits(self.loss_mask).tobytes())
        return digest.digest()[:16]


def next_tokens(tokens: Any, *, xp: Any = np) -> Any:
    """Label of every position, [..., S]: the token after it. The last is 0 and never scored."""
    return xp.concatenate([tokens[..., 1:], xp.zeros_like(tokens[..., :1])], axis=-1)


def loss_mask(segment_ids: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Whether position t has a target: token t + 1 is of the same segment and counts."""
    mask = np.zeros(len(segment_ids), bool)
    same = segment_ids[1:] == segment_ids[:-1]
    mask[:-1] = same & (segment_ids[:-1] != PADDING) & counted[1:]
    return mask


def stored_positions(segment_ids: Any, loss_mask: Any, *, xp: Any = np) -> Any:
    """Positions whose hidden states and maps are stored, bool [..., S]: those that are scored, and
    the last of each segment, which reads a token that may have been learned."""
    last = segment_ids != next_tokens(segment_ids, xp=xp)
    return (segment_ids != PADDING) & (loss_mask | last)


def build_row(segments: list[Segment], *, length: int) -> Row:
    """The row of S = `length` positions that holds `segments` in order, then padding."""
    used = sum(len(segment.tokens) for segment in segments)
    assert used <= length, f"segments of {used} tokens do not fit a row of {length}"
    tokens = np.zeros(length, np.int32)
    segment_ids = np.zeros(length, np.int32)
    positions = np.zeros(length, np.int32)
    counted = np.zeros(length, bool)
    at = 0
    for number, segment in enumerate(segments, start=1):
        here = slice(at, at + len(segment.tokens))
        tokens[here], counted[here] = segment.tokens, segment.counted
        segment_ids[here] = number
        positions[here] = np.arange(len(segment.tokens))
        at = here.stop
    origins = np.array([(s.source, s.document, s.start) for s in segments], np.int64)
    mask = loss_mask(segment_ids, counted)
    return Row(tokens, segment_ids, positions, mask, origins.reshape(-1, 3))


def encode_row(row: Row) -> bytes:
    """The row's record."""
    wide = row.tokens.max(initial=0) >= 1 << 16
    packer = zstandard.ZstdCompressor(level=3)
    tokens = row.tokens.astype("<u4" if wide else "<u2").tobytes()
    lengths = np.bincount(row.segment_ids, minlength=1)[1:]
    blocks = (
        Block(_TOKENS, _ZSTD_U32 if wide else _ZSTD_U16, packer.compress(tokens)),
        Block(_SEGMENTS, _RAW, lengths.astype("<u4").tobytes()),
        Block(_MASK, _RAW, np.packbits(row.loss_mask).tobytes()),
        Block(_ORIGINS, _RAW, row.origins.astype("<i8").tobytes()),
    )
    return Frame(Kind.ROW, row.key, len(row.tokens), blocks).pack()


def decode_row(data: bytes, *, where: str) -> tuple[Row, bytes]:
    """The row in a record and its key. ValueError naming `where` if it is damaged."""
    frame = unpack(data, kind=Kind.ROW, where=where)
    length = frame.positions
    tokens = _decode_tokens(frame.block(_TOKENS, where=where), length, where=where)
    lengths = np.frombuffer(frame.block(_SEGMENTS, where=where).payload, "<u4").tolist()
    if sum(lengths) > length:
        raise ValueError(f"{where}: segments of {sum(lengths)} tokens in a row of {length}")
    segment_ids, positions = np.zeros((2, length), np.int32)
    at = 0
    for number, count in enumerate(lengths, start=1):
        segment_ids[at : at + count] = number
        positions[at : at + count] = np.arange(count)
        at += count
    bits = np.frombuffer(frame.block(_MASK, where=where).payload, np.uint8)
    mask = np.unpackbits(bits, count=length).view(bool)
    origins = np.frombuffer(frame.block(_ORIGINS, where=where).payload, "<i8").reshape(-1, 3)
    return Row(tokens, segment_ids, positions, mask, origins.astype(np.int64)), frame.row_key


def _decode_tokens(block: Block, length: int, *, where: str) -> np.ndarray:
    dtypes = {_ZSTD_U16: "<u2", _ZSTD_U32: "<u4"}
    if block.codec not in dtypes:
        raise ValueError(f"{where}: tokens use codec {block.codec}, which this release lacks")
    raw = _zstd.decompressor.decompress(block.payload)
    tokens = np.frombuffer(raw, dtypes[block.codec]).astype(np.int32)
    if len(tokens) != length:
        raise ValueError(f"{where}: expected {length} tokens, got {len(tokens)}")
    return tokens
