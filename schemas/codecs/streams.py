"""Byte streams: sections inside a payload, and zstd frames without their redundant headers."""

import threading
from collections.abc import Sequence

import numpy as np
import zstandard
from jaxtyping import UInt8

# Matches in these streams are accidents that cost more than they save; what pays is zstd's
# entropy stage. The smallest hash and the longest minimal match keep the match finder out.
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
# Every frame starts with the same two bytes: no content size, no checksum, a window of 1 MiB
# (any that is not smaller than the encoder's). They are not stored, and since they are ours,
# an altered payload cannot claim a size of its own.
_HEADER = bytes((0x00, (20 - 10) << 3))
_local = threading.local()


def _compressor() -> zstandard.ZstdCompressor:
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(compression_params=_ENTROPY_ONLY)
    return _local.compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    return _local.decompressor


def squeeze(values: np.ndarray) -> bytes:
    """The bytes of an array, entropy-coded; as they are where that would not be smaller."""
    raw = values.tobytes()
    frame = _compressor().compress(raw)[len(_HEADER) :]
    return frame if len(frame) < len(raw) else raw


def expand(sections: Sequence[bytes], *, sizes: Sequence[int]) -> UInt8[np.ndarray, " total"]:
    """The bytes that `squeeze` was given for each section, `sizes` of them, one after another."""
    inflated = [_inflated(s, size=size) for s, size in zip(sections, sizes, strict=True)]
    return np.frombuffer(b"".join(inflated), np.uint8)


def _inflated(section: bytes, *, size: int) -> bytes:
    if len(section) == size:
        return section
    try:
        raw = _decompressor().decompress(
            _HEADER + section, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged stream of {len(section)} bytes: {error}") from None
    if len(raw) != size:
        raise ValueError(f"stream of {len(raw)} bytes where {size} are expected")
    return raw


def spans(sizes: Sequence[int]) -> list[slice]:
    """Where the columns of each record lie among those of all."""
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def beside(flat: np.ndarray, *, rows: int, columns: Sequence[int]) -> np.ndarray:
    """[rows, total]: side by side the arrays [rows, columns[i]] that `flat` holds in turn."""
    out = np.empty((rows, sum(columns)), flat.dtype)
    for span in spans(columns):
        out[:, span] = flat[rows * span.start : rows * span.stop].reshape(rows, -1)
    return out


def id_planes(vocabulary: int) -> int:
    """Bytes that an id, or a rank among all ids, takes."""
    return max(1, (int(vocabulary - 1).bit_length() + 7) // 8)


def columns(k: int, most: int) -> list[slice]:
    """`most` runs of k columns of about equal length, or as many as there are."""
    count = min(most, k)
    return [slice(k * i // count, k * (i + 1) // count) for i in range(count)]


def join(sections: list[bytes]) -> bytes:
    """One payload out of sections, each with its length before it."""
    lengths = b"".join(_varint(len(section)) for section in sections)
    return lengths + b"".join(sections)


def split(payload: bytes, *, count: int) -> list[bytes]:
    """The `count` sections of a payload; raises unless they fill it exactly."""
    lengths, at = [], 0
    for _ in range(count):
        length, at = _read_varint(payload, at)
        lengths.append(length)
    if at + sum(lengths) != len(payload):
        raise ValueError(
            f"payload of {len(payload)} bytes where its sections need {at + sum(lengths)}"
        )
    sections = []
    for length in lengths:
        sections.append(payload[at : at + length])
        at += length
    return sections


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


def small(values: np.ndarray, *, dtype: str = "<u2") -> tuple[np.ndarray, bytes]:
    """Non-negative integers as bytes, and beside them those above 254, which became 255."""
    escaped = values >= 255
    if not escaped.any():
        return values.astype(np.uint8), b""
    return np.where(escaped, 255, values).astype(np.uint8), values[escaped].astype(dtype).tobytes()


def unsmall(
    codes: np.ndarray, escapes: Sequence[bytes], *, sizes: Sequence[int], dtype: str = "<u2"
) -> np.ndarray:
    """The integers that `small` was given, for records side by side in `codes` [..., n].

    Record i is `sizes[i]` columns and `escapes[i]`. uint32; still bytes if there was none above
    254.
    """
    escaped = codes == 255
    if not any(escapes) and not escaped.any():
        return codes
    values = codes.astype(np.uint32)
    for section, span in zip(escapes, spans(sizes), strict=True):
        there = escaped[..., span]
        count = np.count_nonzero(there)
        if count * np.dtype(dtype).itemsize != len(section):
            raise ValueError(f"{count} escaped values but {len(section)} bytes of them")
        if count:
            values[..., span][there] = np.frombuffer(section, dtype)
    return values


def summed(rows: np.ndarray) -> np.ndarray:
    """`rows` [k, n], in place, each added to the sum of those before it."""
    for i in range(1, len(rows)):  # a tenth of np.cumsum's time for rows of this length
        rows[i] += rows[i - 1]
    return rows
