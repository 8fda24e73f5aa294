"""Non-negative integers below 2^24, split into a symbol for the entropy stage and raw low bits.

A symbol is the number's bit length and the two bits after its leading one. The bits below are close
to uniform and are stored raw.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Integer, UInt8

from decant.schemas.codecs import bits

_SYMBOLS = 4 * (bits.LARGEST_WIDTH + 2)


def encode(
    numbers: Integer[np.ndarray, "..."], *, low: UInt8[np.ndarray, "..."] | None = None
) -> tuple[UInt8[np.ndarray, "..."], bytes]:
    """The symbols, and the packed raw bits in the order of the array.

    The lowest `low` bits of each number (an array that broadcasts; None for none) are raw whatever
    its size.
    """
    whole = numbers
    if low is not None:
        numbers = whole >> low
    # The exponent and two leading mantissa bits of the float32, which is exact below 2^24.
    leading = (numbers.astype(np.float32).view(np.uint32) >> np.uint32(21)).astype(np.int32) - 512
    symbols = np.where(numbers < 4, numbers, leading).astype(np.uint8)
    widths = _widths(symbols)
    if low is not None:
        widths += low
    return symbols, bits.pack(whole.reshape(-1), widths=widths.reshape(-1))


def decode(
    symbols: UInt8[np.ndarray, "rows all"],
    raw: Sequence[bytes],
    *,
    low: UInt8[np.ndarray, "rows all"] | None = None,
) -> Int32[np.ndarray, "rows all"]:
    """The numbers of a grid of records (see `streams.grid`); `raw[i]` holds the bits of record i.

    `low` is as in `encode`, for each number of the grid; 0 between records. ValueError for symbols
    that `encode` never makes.
    """
    if symbols.size and symbols.max() >= _SYMBOLS:
        raise ValueError(f"symbol {symbols.max()} of a number; there are {_SYMBOLS}")
    leading = np.minimum(symbols, symbols & 3 | 4)
    widths = _widths(symbols)
    if low is not None:
        widths += low
        if widths.max(initial=0) > bits.LARGEST_WIDTH:
            raise ValueError(f"a number of {widths.max()} raw bits")
    return bits.unpack(raw, widths=widths, above=leading).view(np.int32)


def _widths(symbols: UInt8[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Number of raw bits that follow each symbol."""
    fours = symbols >> 2
    return fours - (fours > 0)
