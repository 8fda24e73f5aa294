"""Non-negative integers below 2^24, split into a symbol for the entropy stage and raw low bits.

A symbol is the number's bit length and the two bits after its leading one. The bits below are close
to uniform and are stored raw.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Integer, UInt8

from decant.schemas.codecs import bits

_SYMBOLS = 4 * (bits.LARGEST_WIDTH + 2)


def encode(numbers: Integer[np.ndarray, "..."]) -> tuple[UInt8[np.ndarray, "..."], bytes]:
    """The symbols, and the packed raw bits in the order of the array."""
    # The exponent and two leading mantissa bits of the float32, which is exact below 2^24.
    leading = (numbers.astype(np.float32).view(np.uint32) >> np.uint32(21)).astype(np.int32) - 512
    symbols = np.where(numbers < 4, numbers, leading).astype(np.uint8)
    return symbols, bits.pack(numbers.reshape(-1), widths=_widths(symbols.reshape(-1)))


def decode(
    symbols: UInt8[np.ndarray, "rows all"], raw: Sequence[bytes]
) -> Int32[np.ndarray, "rows all"]:
    """The numbers of a grid of records (see `streams.grid`); `raw[i]` holds the bits of record i.

    ValueError for symbols that `encode` never makes.
    """
    if symbols.size and symbols.max() >= _SYMBOLS:
        raise ValueError(f"symbol {symbols.max()} of a number; there are {_SYMBOLS}")
    leading = np.minimum(symbols, symbols & 3 | 4)
    return bits.unpack(raw, widths=_widths(symbols), above=leading).view(np.int32)


def _widths(symbols: UInt8[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Number of raw bits that follow each symbol."""
    fours = symbols >> 2
    return fours - (fours > 0)
