"""Codec of the number of ids of each position of an adaptive head: few different numbers."""

import numpy as np
from jaxtyping import Integer

from decant.schemas.codecs.streams import compress, decompress

_MOST = 255


def encode(sizes: Integer[np.ndarray, " n"]) -> bytes:
    """The payload: how many different sizes, each as u32, then one byte a position."""
    present, number = np.unique(sizes, return_inverse=True)
    assert len(present) <= _MOST, "sizes are rungs of a ladder"
    frame = compress(number.astype(np.uint8))
    return bytes([len(present)]) + present.astype("<u4").tobytes() + frame


def decode(payload: bytes, *, positions: int) -> Integer[np.ndarray, " n"]:
    """The sizes of `positions` positions. ValueError for a damaged payload."""
    count = payload[0] if payload else 0
    start = 1 + 4 * count
    if len(payload) < start:
        raise ValueError(f"sizes of {len(payload)} bytes")
    present = np.frombuffer(payload, "<u4", count, offset=1).astype(np.int64)
    number = decompress([payload[start:]], sizes=[positions])
    if not np.array_equal(np.unique(number), np.arange(count)):
        raise ValueError(f"numbers of sizes that are not the {count} that follow")
    if count and (present[0] < 1 or (np.diff(present) <= 0).any()):
        raise ValueError(f"sizes {present.tolist()} are not ascending from 1")
    return present[number]
