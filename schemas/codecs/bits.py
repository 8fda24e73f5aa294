"""Integers of varying widths, bit after bit, without a loop over them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer, UInt8, UInt32

LARGEST_WIDTH = 24
_MASKS = (1 << np.arange(LARGEST_WIDTH + 1, dtype=np.uint32)) - np.uint32(1)


def pack(values: Integer[np.ndarray, " n"], *, widths: Integer[np.ndarray, " n"]) -> bytes:
    """The low `widths[i]` bits of each value, least significant first; widths ≤ 24."""
    ends = np.cumsum(widths, dtype=np.int64)
    if not len(ends) or not ends[-1]:
        return b""
    starts = ends - widths
    words = starts >> 5
    # Values that start in one 32-bit word do not overlap in 64 bits: their sum is their union.
    shifted = (values.astype(np.uint32) & _MASKS[widths]).astype(np.uint64)
    shifted <<= (starts & 31).astype(np.uint64)
    first = np.flatnonzero(np.diff(words, prepend=-1))
    sums, at = np.add.reduceat(shifted, first), words[first]
    out = np.zeros(int(at[-1]) + 2, np.uint64)
    out[at] = sums & np.uint64(0xFFFFFFFF)
    out[at + 1] += sums >> np.uint64(32)
    return out.astype("<u4").tobytes()[: (int(ends[-1]) + 7) // 8]


def unpack(
    sections: Sequence[bytes], *, widths: UInt8[np.ndarray, " n"], sizes: Sequence[int]
) -> UInt32[np.ndarray, " n"]:
    """What `pack` was given for each section, one after another; section i has `sizes[i]` values.

    ValueError unless every section has exactly its values' bits.
    """
    starts = _starts(widths, spare=8 * len(sections))
    offset = first = 0
    for section, size in zip(sections, sizes, strict=True):
        # The last entry of `starts` is the end of all.
        begin, end = int(starts[first]), int(starts[first + size])
        if len(section) != (end - begin + 7) // 8:
            raise ValueError(
                f"{len(section)} bytes of raw bits where {(end - begin + 7) // 8} are expected"
            )
        starts[first : first + size] += 8 * offset - begin
        offset, first = offset + len(section), first + size
    starts = starts[:-1]
    # One 32-bit window at every byte: a shift of ≤ 7 and a width of ≤ 24 stay inside.
    padded = b"".join([*sections, bytes(8)])
    windows = np.ndarray((offset + 4,), "<u4", padded, strides=(1,)).astype(np.uint32)
    shifts = starts.astype(np.uint32)
    shifts &= np.uint32(7)
    starts >>= 3
    values = windows.take(starts, mode="clip")
    values >>= shifts
    values &= ~(np.uint32(0xFFFFFFFF) << widths.astype(np.uint32))
    return values


def _starts(widths: UInt8[np.ndarray, " n"], *, spare: int) -> Integer[np.ndarray, " n+1"]:
    """The sum of the widths before each, and of all at the end.

    Eight bytes are added up at once, by a product: np.cumsum takes four times as long.
    """
    eights = np.zeros(len(widths) // 8 + 1, "<u8")  # with at least one width of 0 at the end
    eights.view(np.uint8)[: len(widths)] = widths
    sums = eights * np.uint64(0x0101010101010101)  # byte j: the first j + 1, 8 · 24 at most
    totals = (sums >> np.uint64(56)).astype(np.int64)
    ends = np.cumsum(totals)
    narrow = ends[-1] + spare < 1 << 31
    starts = np.repeat((ends - totals).astype(np.int32 if narrow else np.int64), 8)
    starts += (sums - eights).view(np.uint8)
    return starts[: len(widths) + 1]
