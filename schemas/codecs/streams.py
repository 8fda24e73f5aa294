"""Byte streams: sections inside a payload, and zstd frames without their redundant headers."""

import threading

import numpy as np
import zstandard

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


def expand(section: bytes, *, size: int) -> np.ndarray:
    """The `size` bytes that `squeeze` was given (uint8, read-only)."""
    if len(section) == size:
        return np.frombuffer(section, np.uint8)
    try:
        raw = _decompressor().decompress(
            _HEADER + section, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged stream of {len(section)} bytes: {error}") from None
    if len(raw) != size:
        raise ValueError(f"stream of {len(raw)} bytes where {size} are expected")
    return np.frombuffer(raw, np.uint8)


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
    value = 0
    for shift in range(0, 63, 7):
        if at >= len(payload):
            break
        byte = payload[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ValueError(f"payload of {len(payload)} bytes ends inside its table of sections")


def small(values: np.ndarray, *, dtype: str = "<u2") -> tuple[np.ndarray, bytes]:
    """Non-negative integers as bytes, and beside them those above 254, which became 255."""
    escaped = values >= 255
    if not escaped.any():
        return values.astype(np.uint8), b""
    return np.where(escaped, 255, values).astype(np.uint8), values[escaped].astype(dtype).tobytes()


def unsmall(codes: np.ndarray, escapes: bytes, *, dtype: str = "<u2") -> np.ndarray:
    """The integers that `small` was given; still bytes when there was none above 254."""
    width = np.dtype(dtype).itemsize
    escaped = np.flatnonzero(codes.reshape(-1) == 255)
    if len(escaped) * width != len(escapes):
        raise ValueError(f"{len(escaped)} escaped values but {len(escapes)} bytes of them")
    if not len(escaped):
        return codes
    values = codes.astype(dtype)
    values.reshape(-1)[escaped] = np.frombuffer(escapes, dtype)
    return values
