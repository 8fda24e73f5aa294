"""Non-negative integers below 2^24 as a symbol for the entropy stage and raw low bits.

A symbol is a number's bit length and the two bits after the leading one; what is below those is
close to uniform and is stored as it is.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer, UInt8

from schemas.codecs import bits
from schemas.codecs.streams import beside

_SYMBOLS = 4 * (bits.LARGEST_WIDTH + 2)


def encode(numbers: Integer[np.ndarray, "..."]) -> tuple[UInt8[np.ndarray, "..."], bytes]:
    """Symbols, and the packed raw bits in the order of the array."""
    # The exponent and two leading mantissa bits of a float32, which is exact below 2^24.
    leading = (numbers.astype(np.float32).view(np.uint32) >> np.uint32(21)).astype(np.int32) - 512
    symbols = np.where(numbers < 4, numbers, leading).astype(np.uint8)
    return symbols, bits.pack(numbers.reshape(-1), widths=_widths(symbols.reshape(-1)))


def decode(
    symbols: UInt8[np.ndarray, " n"], raw: Sequence[bytes], *, rows: int, columns: Sequence[int]
) -> Integer[np.ndarray, "rows total"]:
    """The numbers (int32) that `encode` was given, arrays of `rows` rows side by side.

    Of array i, which has `columns[i]` columns, `symbols` holds one after the other and `raw[i]`
    the bits. ValueError for symbols that `encode` never makes.
    """
    if symbols.size and symbols.max() >= _SYMBOLS:
        raise ValueError(f"symbol {symbols.max()} of a number; there are {_SYMBOLS}")
    widths = _widths(symbols)
    numbers = np.minimum(symbols, symbols & 3 | 4).astype(np.uint32)  # the leading bits
    numbers <<= widths.astype(np.uint32)
    numbers |= bits.unpack(raw, widths=widths, sizes=[rows * count for count in columns])
    return beside(numbers.view(np.int32), rows=rows, columns=columns)


def _widths(symbols: UInt8[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Raw bits below a symbol's leading ones."""
    return np.maximum(symbols >> 2, 1) - 1
