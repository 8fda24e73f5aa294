"""Byte streams: sections of a payload, zstd frames without redundant headers, grids of records.

A grid is an array [rows, columns] that holds an array of each record side by side, so that one
numpy call computes on all records.
"""

import struct
import threading
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
import zstandard
from jaxtyping import Integer, Shaped, UInt8

# Only zstd's entropy stage saves bytes here; matches in these streams are accidental and cost more
# than they save. The smallest hash and the longest minimal match disable the match finder.
_ENTROPY_ONLY = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=17,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    format=zstandard.FORMAT_ZSTD1_MAGICLESS,
    write_content_size=0,
)
# Every frame begins with the same two bytes (no content size, no checksum, a window), which are not
# stored. The reader prepends a header with the expected size instead. No window is then needed, and
# an altered payload cannot claim another size.
_HEADER_BYTES = 2
_SIZED = struct.Struct("<BI")
_SIZE_FOLLOWS = 0xA0
"""Frame descriptor: single segment, content size of four bytes."""


class _Zstd(threading.local):
    """One compressor and one decompressor per thread."""

    def __init__(self):
        self.compressor = zstandard.ZstdCompressor(compression_params=_ENTROPY_ONLY)
        self.decompressor = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)


_zstd = _Zstd()


def compress(values: np.ndarray) -> bytes:
    """The bytes of an array, entropy-coded if that makes them fewer."""
    raw = values.tobytes()
    frame = _zstd.compressor.compress(raw)[_HEADER_BYTES:]
    return frame if len(frame) < len(raw) else raw


def decompress(sections: Sequence[bytes], *, sizes: Sequence[int]) -> UInt8[np.ndarray, " total"]:
    """The bytes that `compress` was given, sections one after another.

    `sizes[i]` is the uncompressed size of section i. ValueError if a section is damaged.
    """
    inflate = _zstd.decompressor.decompress
    try:
        inflated = [
            section
            if len(section) == size
            # Arguments: no own limit, one frame, no trailing bytes. zstd would ignore a size of 0.
            else inflate(_SIZED.pack(_SIZE_FOLLOWS, size or 1) + section, 0, False, False)
            for section, size in zip(sections, sizes, strict=True)
        ]
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged stream, of {list(map(len, sections))} bytes: {error}") from None
    whole = np.frombuffer(b"".join(inflated), np.uint8)
    if len(whole) != sum(sizes):
        raise ValueError(f"streams of {len(whole)} bytes where {sum(sizes)} are expected")
    return whole


def spans(sizes: Sequence[int]) -> list[slice]:
    """The slice of each record in an array of all records, one after another."""
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def _width(columns: Sequence[int]) -> int:
    """Columns of a grid per record: a multiple of eight, to compute on eight bytes at once.

    The multiple is odd, because rows a power of two apart would share cache lines.
    """
    return 8 * (-(-max(columns) // 8) | 1)


def grid(rows: int, columns: Sequence[int]) -> UInt8[np.ndarray, "rows all"]:
    """A grid of zeros with room for an array [rows, columns[i]] of each record i."""
    return np.zeros((rows, len(columns) * _width(columns)), np.uint8)


def grid_of(
    flat: UInt8[np.ndarray, " total"], columns: Sequence[int]
) -> UInt8[np.ndarray, "1 all"]:
    """A grid of one row; `flat` holds the `columns[i]` numbers of each record one after another."""
    out = grid(1, columns)
    for span, cell in zip(spans(columns), cells(columns), strict=True):
        out[0, cell] = flat[span]
    return out


def cells(columns: Sequence[int]) -> list[slice]:
    """The columns of each record in a grid. Columns between records stay 0."""
    width = _width(columns)
    return [slice(i * width, i * width + count) for i, count in enumerate(columns)]


def fill_columns(
    out: UInt8[np.ndarray, "rows total"], flat: UInt8[np.ndarray, " n"], columns: Sequence[int]
) -> None:
    """Copy arrays [rows, columns[i]] side by side to `out`; `flat` holds them one after another."""
    rows, at = len(out), 0
    for count in columns:
        out[:, at : at + count] = flat[rows * at : rows * (at + count)].reshape(rows, count)
        at += count


def by_position(
    values: Shaped[np.ndarray, "rows all"], columns: Sequence[int]
) -> Shaped[np.ndarray, "total rows"]:
    """The transposed grid without the columns between records."""
    out = np.empty((sum(columns), len(values)), values.dtype)
    for span, cell in zip(spans(columns), cells(columns), strict=True):
        out[span] = values[:, cell].T
    return out


def gather_columns(
    values: Shaped[np.ndarray, "rows all"], columns: Sequence[int]
) -> Shaped[np.ndarray, "rows total"]:
    """The grid without the columns between records."""
    return np.concatenate([values[:, cell] for cell in cells(columns)], axis=1)


def id_planes(vocabulary: int) -> int:
    """Bytes needed for an id or a rank of the vocabulary."""
    return max(1, (int(vocabulary - 1).bit_length() + 7) // 8)


@lru_cache
def column_runs(k: int, most: int) -> tuple[slice, ...]:
    """k columns cut into min(k, most) runs of about equal length, as slices."""
    count = min(most, k)
    return tuple(slice(k * i // count, k * (i + 1) // count) for i in range(count))


@lru_cache
def run_heights(k: int, most: int) -> tuple[int, ...]:
    """Length of each run of `column_runs`."""
    return tuple(run.stop - run.start for run in column_runs(k, most))


def join(sections: list[bytes]) -> bytes:
    """One payload of sections: all their lengths, then all their bytes."""
    lengths = b"".join(_varint(len(section)) for section in sections)
    return lengths + b"".join(sections)


def split(payload: bytes, *, count: int, start: int = 0) -> list[bytes]:
    """The `count` sections that begin at byte `start`. ValueError unless they fill the payload."""
    lengths, at = [], start
    # Two bytes are read at once: a record has dozens of sections, nearly all below 2¹⁴ bytes.
    padded = payload + b"\x80\x80"
    for _ in range(count):
        low, high = padded[at], padded[at + 1]
        if low < 128:
            lengths.append(low)
            at += 1
        elif high < 128:
            lengths.append(low & 127 | high << 7)
            at += 2
        else:
            length, at = _read_varint(payload, at)
            lengths.append(length)
    ends = list(accumulate(lengths, initial=at))
    if ends[-1] != len(payload):
        raise ValueError(f"payload of {len(payload)} bytes where its sections need {ends[-1]}")
    return [payload[a:b] for a, b in pairwise(ends)]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(payload: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(payload) and shift < 63:
        byte = payload[at]
        at += 1
        if byte < 128:
            return value | byte << shift, at
        value |= (byte & 127) << shift
        shift += 7
    raise ValueError(f"payload of {len(payload)} bytes ends inside its table of sections")


def escape(values: np.ndarray, *, dtype: str = "<u2") -> tuple[np.ndarray, bytes]:
    """Non-negative integers as bytes, and the escapes: integers above 254, coded as 255."""
    escaped = values >= 255
    if not escaped.any():
        return values.astype(np.uint8), b""
    return np.where(escaped, 255, values).astype(np.uint8), values[escaped].astype(dtype).tobytes()


def unescape(
    codes: UInt8[np.ndarray, "rows all"],
    escapes: Sequence[bytes],
    *,
    columns: Sequence[int],
    dtype: str = "<u2",
) -> Integer[np.ndarray, "rows all"]:
    """The integers that `escape` was given for the records of a grid; `escapes[i]` are record i's.

    uint32, or uint8 if there are no escapes. ValueError if codes and escapes do not match.
    """
    escaped = codes == 255
    if not any(escapes) and not escaped.any():
        return codes
    values = codes.astype(np.uint32)
    for section, cell in zip(escapes, cells(columns), strict=True):
        mask = escaped[:, cell]
        count = np.count_nonzero(mask)
        if count * np.dtype(dtype).itemsize != len(section):
            raise ValueError(f"{count} escaped values but {len(section)} bytes of them")
        if count:
            values[:, cell][mask] = np.frombuffer(section, dtype)
    return values


def cumsum_in_place(rows: np.ndarray) -> np.ndarray:
    """Cumulative sums over axis 0 of `rows` [k, n], in place."""
    for i in range(1, len(rows)):  # a tenth of the time of np.cumsum for rows of this length
        rows[i] += rows[i - 1]
    return rows
