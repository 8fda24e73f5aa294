"""One training row: its tokens, segments and positions, and which positions have a target.

This module owns the shift by one: **position t is scored against token t + 1**, and `loss_mask[t]`
says whether it is scored. No other module shifts anything.

A row of rollouts (texts that a model wrote) also holds the log-probability that the writer gave to
token t + 1, at position t. Rows without it have the bytes and keys that they had before 0.13.
"""

import hashlib
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

from decant.schemas.disk.frames import Block, Frame, Kind, unpack

_TOKENS, _SEGMENTS, _MASK, _ORIGINS, _WRITER = 1, 2, 3, 4, 5
_RAW, _ZSTD_U16, _ZSTD_U32, _ZSTD_F32_PLANES = 0, 1, 2, 3
PADDING = 0
"""Segment id of padding. Padding has token id 0 and no target."""
ROW_FIELDS = ("tokens", "segment_ids", "positions", "loss_mask")
"""The arrays of a row that readers get."""
WRITER_LOGPROBS = "writer_logprobs"
"""The array that readers get besides, if a cache has rollouts."""


class _Zstd(threading.local):
    """One decompressor per thread; making one takes as long as decoding the rest of a row."""

    def __init__(self):
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()


@dataclass(frozen=True)
class Segment:
    """A piece of one document inside a row, and its origin.

    `tokens` int32 [n].
    `counted` bool [n]: whether the token can be a label. True for all tokens of plain text.
    `source`: index into the part's sources.
    `document`: byte offset of the document in its source; in a table, the number of records before
    it.
    `start`: index in the document of the piece's first token.
    `logprobs` float32 [n]: natural log of the probability that the writer of the text gave to each
    token; NaN where it wrote nothing. None for a text whose writer is unknown.
    """

    tokens: np.ndarray
    counted: np.ndarray
    source: int
    document: int
    start: int
    logprobs: np.ndarray | None = None


@dataclass(frozen=True)
class Row:
    """One training sequence of S positions.

    `tokens` int32 [S].
    `segment_ids` int32 [S]: from 1; 0 is padding.
    `positions` int32 [S]: from 0 in each segment.
    `loss_mask` bool [S]: whether the position has a target.
    `origins` int64 [segments, 3]: source, document, start of each segment.
    `writer_logprobs` float32 [S]: natural log of the probability that the text's writer gave to
    token t + 1; NaN at positions without a target, and where the writer wrote nothing. None if no
    position has one.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray
    origins: np.ndarray
    writer_logprobs: np.ndarray | None = None

    @property
    def key(self) -> bytes:
        """The row's identity: first 16 bytes of sha256(tokens, segment_ids, loss_mask, written)."""
        digest = hashlib.sha256()
        digest.update(self.tokens.astype("<i4").tobytes())
        digest.update(self.segment_ids.astype("<i4").tobytes())
        digest.update(np.packbits(self.loss_mask).tobytes())
        digest.update(self.written.astype("<f4").tobytes())
        return digest.digest()[:16]

    @property
    def written(self) -> np.ndarray:
        """The writer's log-probabilities at the scored positions: float32 [scored], or empty if it
        wrote none of their tokens."""
        if self.writer_logprobs is None:
            return np.zeros(0, np.float32)
        values = self.writer_logprobs[self.loss_mask]
        absent = np.isnan(values)
        # One NaN of the many, so that equal rows have equal keys.
        values = np.where(absent, np.float32(np.nan), values)
        return values[:0] if absent.all() else values


def next_tokens(tokens: Any, *, xp: Any = np) -> Any:
    """Labels [..., S]: the token after each position. The last label is 0 and never scored.

    `xp` is numpy or jax.numpy.
    """
    return xp.concatenate([tokens[..., 1:], xp.zeros_like(tokens[..., :1])], axis=-1)


def loss_mask(segment_ids: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Whether position t has a target, bool [S]: token t + 1 is in its segment and counted."""
    mask = np.zeros(len(segment_ids), bool)
    same = segment_ids[1:] == segment_ids[:-1]
    mask[:-1] = same & (segment_ids[:-1] != PADDING) & counted[1:]
    return mask


def stored_positions(segment_ids: Any, loss_mask: Any, *, xp: Any = np) -> Any:
    """Positions whose hidden states and attention maps are stored, bool [..., S].

    These are the scored positions and the last position of each segment, whose input token may be
    the label of the position before. `xp` is numpy or jax.numpy.
    """
    last = segment_ids != next_tokens(segment_ids, xp=xp)
    return (segment_ids != PADDING) & (loss_mask | last)


def build_row(segments: list[Segment], *, length: int) -> Row:
    """A row of `length` positions: `segments` in order, then padding."""
    used = sum(len(segment.tokens) for segment in segments)
    assert used <= length, f"segments of {used} tokens do not fit a row of {length}"
    tokens = np.zeros(length, np.int32)
    segment_ids = np.zeros(length, np.int32)
    positions = np.zeros(length, np.int32)
    counted = np.zeros(length, bool)
    logprobs = np.full(length, np.nan, np.float32)
    at = 0
    for number, segment in enumerate(segments, start=1):
        here = slice(at, at + len(segment.tokens))
        tokens[here], counted[here] = segment.tokens, segment.counted
        segment_ids[here] = number
        positions[here] = np.arange(len(segment.tokens))
        if segment.logprobs is not None:
            logprobs[here] = segment.logprobs
        at = here.stop
    origins = np.array([(s.source, s.document, s.start) for s in segments], np.int64)
    mask = loss_mask(segment_ids, counted)
    return Row(
        tokens,
        segment_ids,
        positions,
        mask,
        origins.reshape(-1, 3),
        _writer_logprobs(next_tokens(logprobs)[mask], mask),
    )


def _writer_logprobs(written: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """float32 [S] with `written` at the scored positions and NaN at others; None if all are."""
    if np.isnan(written).all():
        return None
    values = np.full(len(mask), np.nan, np.float32)
    values[mask] = written
    return values


def encode_row(row: Row) -> bytes:
    """The record of a row."""
    wide = row.tokens.max(initial=0) >= 1 << 16
    packer = zstandard.ZstdCompressor(level=3)
    tokens = row.tokens.astype("<u4" if wide else "<u2").tobytes()
    lengths = np.bincount(row.segment_ids, minlength=1)[1:]
    blocks = [
        Block(_TOKENS, _ZSTD_U32 if wide else _ZSTD_U16, packer.compress(tokens)),
        Block(_SEGMENTS, _RAW, lengths.astype("<u4").tobytes()),
        Block(_MASK, _RAW, np.packbits(row.loss_mask).tobytes()),
        Block(_ORIGINS, _RAW, row.origins.astype("<i8").tobytes()),
    ]
    if len(written := row.written):
        # First bytes of all numbers, then second bytes, …: exact, and a fifth smaller than raw.
        planes = written.astype("<f4").view("u1").reshape(-1, 4).T
        blocks.append(Block(_WRITER, _ZSTD_F32_PLANES, packer.compress(planes.tobytes())))
    return Frame(Kind.ROW, row.key, len(row.tokens), tuple(blocks)).pack()


def decode_row(data: bytes, *, where: str, length: int) -> tuple[Row, bytes]:
    """The row of `length` positions in a record, and the key that the record states.

    ValueError that begins with `where` if the record is damaged or of a row of another length.
    """
    frame = unpack(data, kind=Kind.ROW, where=where)
    if frame.positions != length:
        raise ValueError(f"{where}: expected a row of {length} positions, got {frame.positions}")
    tokens = _decode_tokens(frame.block(_TOKENS, where=where), length, where=where)
    lengths = _integers(frame.block(_SEGMENTS, where=where), "<u4", where=where).tolist()
    if sum(lengths) > length:
        raise ValueError(f"{where}: segments of {sum(lengths)} tokens in a row of {length}")
    segment_ids, positions = np.zeros((2, length), np.int32)
    at = 0
    for number, count in enumerate(lengths, start=1):
        segment_ids[at : at + count] = number
        positions[at : at + count] = np.arange(count)
        at += count
    bits = _integers(frame.block(_MASK, where=where), "u1", where=where)
    mask = np.unpackbits(bits, count=length).view(bool)
    origins = _integers(frame.block(_ORIGINS, where=where), "<i8", where=where)
    if len(bits) != (length + 7) // 8 or len(origins) != 3 * len(lengths):
        raise ValueError(
            f"{where}: a mask of {len(bits)} bytes and {len(origins)} numbers of origins, for "
            f"{length} positions of {len(lengths)} segments"
        )
    origins = origins.reshape(-1, 3).astype(np.int64)
    writer = _decode_writer(frame, mask, where=where)
    return Row(tokens, segment_ids, positions, mask, origins, writer), frame.row_key


def _decode_writer(frame: Frame, mask: np.ndarray, *, where: str) -> np.ndarray | None:
    block = next((block for block in frame.blocks if block.field == _WRITER), None)
    if block is None:
        return None
    where = f"{where}: log-probabilities of the writer"
    if block.codec != _ZSTD_F32_PLANES:
        raise ValueError(f"{where} use codec {block.codec}, which this release lacks")
    raw = _inflate(block, 4 * int(mask.sum()), where=where)
    written = np.frombuffer(raw, "u1").reshape(4, -1).T.copy().view("<f4")[:, 0]
    written = written.astype(np.float32)
    if (written > 0).any() or np.isneginf(written).any():
        raise ValueError(f"{where} hold a number above 0 or -inf")
    return _writer_logprobs(written, mask)


def _integers(block: Block, dtype: str, *, where: str) -> np.ndarray:
    if len(block.payload) % np.dtype(dtype).itemsize:
        raise ValueError(f"{where}: field {block.field} of {len(block.payload)} bytes is cut off")
    return np.frombuffer(block.payload, dtype)


def _decode_tokens(block: Block, length: int, *, where: str) -> np.ndarray:
    dtypes = {_ZSTD_U16: "<u2", _ZSTD_U32: "<u4"}
    if block.codec not in dtypes:
        raise ValueError(f"{where}: tokens use codec {block.codec}, which this release lacks")
    dtype = np.dtype(dtypes[block.codec])
    raw = _inflate(block, length * dtype.itemsize, where=f"{where}: its tokens")
    return np.frombuffer(raw, dtype).astype(np.int32)


def _inflate(block: Block, expected: int, *, where: str) -> bytes:
    """The `expected` bytes that a block holds compressed."""
    try:
        # Asked before, because zstd allocates what the frame says.
        size = zstandard.frame_content_size(block.payload)
        if size != expected:
            raise ValueError(f"{where}: expected {expected} bytes, got {size}")
        return _zstd.decompressor.decompress(block.payload)
    except zstandard.ZstdError as error:
        raise ValueError(f"{where} cannot be read: {error}") from None
