"""Pack and unpack integers of varying bit widths, vectorised."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, Integer, UInt8, UInt32

LARGEST_WIDTH = 24
_ONES = np.uint64(0x0101010101010101)
_MASKS = (1 << np.arange(LARGEST_WIDTH + 1, dtype=np.uint32)) - np.uint32(1)


def pack(values: Integer[np.ndarray, " n"], *, widths: Integer[np.ndarray, " n"]) -> bytes:
    """The low `widths[i]` bits of each `values[i]`, least significant first; widths ≤ 24."""
    ends = np.cumsum(widths, dtype=np.int64)
    if not len(ends) or not ends[-1]:
        return b""
    starts = ends - widths
    words = starts >> 5
    # Values that start in the same 32-bit word do not overlap within 64 bits, so adding them is
    # the same as combining their bits.
    shifted = (values.astype(np.uint32) & _MASKS[widths]).astype(np.uint64)
    shifted <<= (starts & 31).astype(np.uint64)
    first = np.flatnonzero(np.diff(words, prepend=-1))
    sums, at = np.add.reduceat(shifted, first), words[first]
    out = np.zeros(int(at[-1]) + 2, np.uint64)
    out[at] = sums & np.uint64(0xFFFFFFFF)
    out[at + 1] += sums >> np.uint64(32)
    return out.astype("<u4").tobytes()[: (int(ends[-1]) + 7) // 8]


def unpack(
    sections: Sequence[bytes],
    *,
    widths: UInt8[np.ndarray, "rows all"],
    above: UInt8[np.ndarray, "rows all"],
) -> UInt32[np.ndarray, "rows all"]:
    """The values that `pack` was given, with the bits of `above` put in front of each.

    `sections[i]` holds the packed bits of record i. The arrays are grids (see `streams.grid`): each
    record has a multiple of eight columns, and its values are packed row by row. ValueError unless
    every section has exactly the bits of its values.
    """
    # One product gives the prefix sums of eight widths; np.cumsum takes four times as long. Byte
    # offsets common to eight values are computed once, the differences as bytes of one word.
    eights = widths.view("<u8").reshape(len(widths), len(sections), -1)
    sums = eights * _ONES  # byte j: sum of the first j + 1 widths, at most 8 · 24
    begins = _bit_offsets((sums >> np.uint64(56)).view(np.int64), sections)
    # Byte j: the bit where value j begins, relative to the first byte; at most 7 + 7 · 24.
    within = (begins & 7).view(np.uint64) * _ONES
    within += sums << np.uint64(8)
    shifts = (within & _ONES * np.uint64(7)).view(np.uint8).reshape(widths.shape)
    within >>= np.uint64(3)
    within &= _ONES * np.uint64(31)
    begins >>= 3
    data = b"".join([*sections, bytes(8)])
    at = np.repeat(begins.astype(np.int32 if len(data) < 1 << 31 else np.int64), 8)
    at += within.view(np.uint8).reshape(-1).astype(at.dtype)
    # A 32-bit window begins at every byte. A shift ≤ 7 and a width ≤ 24 stay inside it.
    windows = np.ndarray((len(data) - 4,), "<u4", data, strides=(1,)).astype(np.uint32)
    values = windows.take(at, mode="clip").reshape(widths.shape)
    values >>= shifts
    # Products with powers of two take half the time of shifts.
    powers = np.uint32(1) << widths.astype(np.uint32)
    leading = above.astype(np.uint32)
    leading *= powers
    powers -= np.uint32(1)
    values &= powers
    values |= leading
    return values


def _bit_offsets(
    bits: Int64[np.ndarray, "rows records n"], sections: Sequence[bytes]
) -> Int64[np.ndarray, "rows records n"]:
    """The bit offset in the joined sections where each eight values begin; `bits` are their sizes.

    Records are stored one after another, each row by row.
    """
    rows, records, n = bits.shape
    in_order = bits.transpose(1, 0, 2).reshape(records, -1)
    begins = np.cumsum(in_order, axis=1)
    lengths, expected = np.array([len(section) for section in sections]), (begins[:, -1] + 7) // 8
    if (wrong := np.flatnonzero(lengths != expected)).size:
        at = wrong[0]
        raise ValueError(f"{lengths[at]} bytes of raw bits where {expected[at]} are expected")
    begins -= in_order
    begins += 8 * (np.cumsum(lengths) - lengths)[:, None]
    return np.ascontiguousarray(begins.reshape(records, rows, n).transpose(1, 0, 2))
