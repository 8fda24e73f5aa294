"""Non-negative integers below 2^24 as a symbol for the entropy stage and raw low bits.

A symbol is a number's bit length and the two bits after the leading one; what is below those is
close to uniform and is stored as it is.
"""

import numpy as np
from jaxtyping import Integer, UInt8

from schemas.codecs import bits

_SYMBOLS = np.arange(4 * (bits.LARGEST_WIDTH + 2))
_WIDTH = np.maximum((_SYMBOLS >> 2) - 1, 0).astype(np.uint8)
"""Raw bits below a symbol's two leading ones."""
_BASE = np.where(_SYMBOLS < 8, _SYMBOLS, (4 + (_SYMBOLS & 3)) << _WIDTH).astype(np.int32)
"""The smallest number of each symbol."""


def encode(numbers: Integer[np.ndarray, "..."]) -> tuple[UInt8[np.ndarray, "..."], bytes]:
    """Symbols, and the packed raw bits in the order of the array."""
    # The exponent and two leading mantissa bits of a float32, which is exact below 2^24.
    leading = (numbers.astype(np.float32).view(np.uint32) >> np.uint32(21)).astype(np.int32) - 512
    symbols = np.where(numbers < 4, numbers, leading).astype(np.uint8)
    widths = _WIDTH.take(symbols.reshape(-1), mode="clip")
    return symbols, bits.pack(numbers.reshape(-1), widths=widths)


def decode(symbols: UInt8[np.ndarray, "..."], raw: bytes) -> Integer[np.ndarray, "..."]:
    """The numbers (int32) that `encode` was given. ValueError for symbols that it never makes."""
    if symbols.size and symbols.max() >= len(_SYMBOLS):
        raise ValueError(f"symbol {symbols.max()} of a number; there are {len(_SYMBOLS)}")
    numbers = bits.unpack(raw, widths=_WIDTH.take(symbols.reshape(-1), mode="clip")).view(np.int32)
    numbers = numbers.reshape(symbols.shape)
    numbers += _BASE.take(symbols, mode="clip")
    return numbers
