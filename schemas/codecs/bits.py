"""Integers of varying widths, bit after bit, without a loop over them."""

import numpy as np
from jaxtyping import Integer

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


def unpack(section: bytes, *, widths: Integer[np.ndarray, " n"]) -> Integer[np.ndarray, " n"]:
    """What `pack` was given (uint32); raises unless the section has exactly their bits."""
    starts = np.cumsum(widths, dtype=np.int64)
    wanted = (int(starts[-1]) + 7) // 8 if len(starts) else 0
    if len(section) != wanted:
        raise ValueError(f"{len(section)} bytes of raw bits where {wanted} are expected")
    starts -= widths
    # One 32-bit window at every byte: a shift of ≤ 7 and a width of ≤ 24 stay inside.
    padded = section + bytes(8)
    windows = np.ndarray((len(section) + 4,), "<u4", padded, strides=(1,)).astype(np.uint32)
    shifts = starts.astype(np.uint32)
    shifts &= np.uint32(7)
    starts >>= 3
    values = windows.take(starts, mode="clip")
    values >>= shifts
    values &= _MASKS.take(widths, mode="clip")
    return values
