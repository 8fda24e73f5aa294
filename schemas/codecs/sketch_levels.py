"""Levels of a sketch: whole numbers, whose spread differs from column to column.

A row is too short to carry a table for each column, so columns are made alike:
- Of a *wide* column the lowest bits are stored raw, as many as make what is left spread over one to
  two. The columns then share a few zstd frames.
- Of *narrow* columns, 2, 4 or 8 numbers share a byte, because a byte takes at least one bit. A
  number too large for its digit is stored apart.
Signs are folded: 0, −1, 1, −2 … become 0, 1, 2, 3 ….
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int32, Integer, UInt8

from decant.schemas.codecs import numbers
from decant.schemas.codecs.streams import (
    cells,
    column_runs,
    compress,
    decompress,
    fill_columns,
    grid,
    join,
    run_heights,
    split,
)

LARGEST = (1 << 22) - 1
"""Levels beyond it are clipped: they would be 64 deviations of the widest column at least."""
_REST = 1.0
"""Least spread of what is left of a wide column with raw bits."""
_PACKED = ((1.1, 2), (0.4, 4), (0.12, 8))
"""Numbers that share a byte, for columns whose spread is below each bound."""
_ENTRIES_PER_FRAME = 8192
"""Fewest symbols in a zstd frame, so that the frame's own Huffman table pays off."""
_MOST_FRAMES = 8


@dataclass(frozen=True, eq=False)
class _Packed:
    """Columns of which `per_byte` numbers share a byte."""

    columns: Integer[np.ndarray, " columns"]
    per_byte: int

    @property
    def bits(self) -> int:
        """Bits of a digit."""
        return 8 // self.per_byte

    @property
    def height(self) -> int:
        """Bytes of a position."""
        return -(-len(self.columns) // self.per_byte)

    def pack(self, folded: Integer[np.ndarray, "r n"]) -> UInt8[np.ndarray, "height n"]:
        """The bytes; digits are cut to the largest."""
        digits = np.minimum(folded[self.columns], (1 << self.bits) - 1).astype(np.uint8)
        short = self.height * self.per_byte - len(digits)
        digits = np.pad(digits, ((0, short), (0, 0))).reshape(self.height, self.per_byte, -1)
        out = digits[:, 0].copy()
        for place in range(1, self.per_byte):
            out |= digits[:, place] << np.uint8(place * self.bits)
        return out

    def unpack(self, packed: UInt8[np.ndarray, "height all"]) -> UInt8[np.ndarray, "columns all"]:
        """The digits."""
        shifts = np.arange(self.per_byte, dtype=np.uint8)[:, None] * np.uint8(self.bits)
        digits = packed[:, None] >> shifts & np.uint8((1 << self.bits) - 1)
        digits = digits.reshape(-1, packed.shape[1])
        if digits[len(self.columns) :].any():
            raise ValueError("a number of a sketch beyond its rank")
        return digits[: len(self.columns)]


@dataclass(frozen=True, eq=False)
class _Layout:
    """How each column is stored; a function of the columns' spreads."""

    wide: Integer[np.ndarray, " columns"]
    """Wide columns by what is left of their spread: alike ones are neighbours."""
    low: UInt8[np.ndarray, "columns 1"]
    """Raw bits of each wide column."""
    packed: tuple[_Packed, ...]


def _layout(spreads: Float[np.ndarray, " r"]) -> _Layout:
    per_byte = np.ones(len(spreads), int)
    for below, count in _PACKED:
        per_byte[spreads < below] = count
    wide = np.flatnonzero(per_byte == 1)
    # frexp is exact, unlike a logarithm: all machines agree.
    mantissa, exponent = np.frexp(spreads[wide] / _REST)
    low = np.maximum(exponent - 1, 0)
    by_rest = np.argsort(np.ldexp(mantissa, exponent - low), kind="stable")
    packed = (_Packed(np.flatnonzero(per_byte == count), count) for _, count in _PACKED)
    return _Layout(
        wide[by_rest],
        low[by_rest].astype(np.uint8)[:, None],
        tuple(some for some in packed if len(some.columns)),
    )


def _runs(height: int, n: int) -> int:
    """Number of frames that an array [height, n] is cut into."""
    return max(1, min(_MOST_FRAMES, height * n // _ENTRIES_PER_FRAME))


def encode(levels: Float[np.ndarray, "r n"], *, spreads: Float[np.ndarray, " r"]) -> bytes:
    """The payload of one record. `spreads` are the columns' standard deviations.

    Sections: raw bits, escapes (raw bits, symbols), frames of the wide columns, frames of each kind
    of narrow columns.
    """
    layout = _layout(spreads)
    whole = np.clip(levels, -LARGEST, LARGEST).astype(np.int32)
    wide = whole[layout.wide]
    symbols, raw = numbers.encode(
        _fold(wide >> layout.low) << layout.low | wide & _mask(layout.low),
        low=layout.low,
    )
    folded, planes, beyond = _fold(whole), [symbols], []
    for some in layout.packed:
        planes.append(some.pack(folded))
        excess = folded[some.columns] - ((1 << some.bits) - 1)
        beyond.append(excess[excess >= 0])
    escapes, escapes_raw = numbers.encode(np.concatenate([np.zeros(0, np.int32), *beyond]))
    frames = [
        compress(plane[rows])
        for plane in planes
        if len(plane)
        for rows in column_runs(len(plane), _runs(*plane.shape))
    ]
    return join([raw, escapes_raw, compress(escapes), *frames])


def decode(
    payloads: Sequence[bytes],
    *,
    positions: Sequence[int],
    spreads: Float[np.ndarray, " r"],
) -> Float32[np.ndarray, "r all"]:
    """The levels of all records as a grid (see `streams.grid`)."""
    layout = _layout(spreads)
    heights = [len(layout.wide), *(some.height for some in layout.packed)]
    planes = [grid(height, positions) for height in heights]
    sections = [
        _split(payload, [plane[:, cell] for plane in planes], n)
        for payload, cell, n in zip(payloads, cells(positions), positions, strict=True)
    ]
    raw, *escapes = (list(some) for some in zip(*sections, strict=True))
    out = np.empty((len(spreads), planes[0].shape[1]), np.float32)
    out[layout.wide] = _wide(layout, planes[0], raw, positions=positions)
    digits = [some.unpack(plane) for some, plane in zip(layout.packed, planes[1:], strict=True)]
    for some, folded in zip(
        layout.packed, _with_escapes(layout, digits, *escapes, positions=positions), strict=True
    ):
        out[some.columns] = _unfold(folded)
    return out


def _split(
    payload: bytes, planes: Sequence[UInt8[np.ndarray, "_ n"]], n: int
) -> tuple[bytes, bytes, bytes]:
    """Fill the planes of one record; returns its raw bits, and those and symbols of escapes."""
    heights = [run_heights(len(p), _runs(len(p), n)) if len(p) else () for p in planes]
    raw, escapes_raw, escapes, *frames = split(payload, count=3 + sum(map(len, heights)))
    flat = decompress(frames, sizes=[height * n for some in heights for height in some])
    at = 0
    for plane in planes:
        fill_columns(plane, flat[at : at + plane.size], [n])
        at += plane.size
    return raw, escapes_raw, escapes


def _wide(
    layout: _Layout,
    symbols: UInt8[np.ndarray, "columns all"],
    raw: Sequence[bytes],
    *,
    positions: Sequence[int],
) -> Int32[np.ndarray, "columns all"]:
    """The levels of the wide columns."""
    if not len(symbols):
        if any(raw):
            raise ValueError(f"{sum(map(len, raw))} bytes of raw bits of no column")
        return symbols.astype(np.int32)
    low = np.zeros_like(symbols)
    for cell in cells(positions):
        low[:, cell] = layout.low
    values = numbers.decode(symbols, raw, low=low)
    return _unfold(values >> layout.low) << layout.low | values & _mask(layout.low)


def _with_escapes(
    layout: _Layout,
    digits: Sequence[UInt8[np.ndarray, "_ all"]],
    raw: Sequence[bytes],
    frames: Sequence[bytes],
    *,
    positions: Sequence[int],
) -> list[Int32[np.ndarray, "_ all"]]:
    """The folded numbers of the narrow columns of each kind."""
    largest = [(1 << some.bits) - 1 for some in layout.packed]
    escaped = [some == most for some, most in zip(digits, largest, strict=True)]
    counts = [
        sum(int(np.count_nonzero(some[:, cell])) for some in escaped) for cell in cells(positions)
    ]
    symbols = grid(1, counts)
    for cell, frame, count in zip(cells(counts), frames, counts, strict=True):
        fill_columns(symbols[:, cell], decompress([frame], sizes=[count]), [count])
    escapes = numbers.decode(symbols, raw)[0]
    values = [some.astype(np.int32) for some in digits]
    for cell, of_record in zip(cells(positions), cells(counts), strict=True):
        at = of_record.start
        for some, mask in zip(values, (masks[:, cell] for masks in escaped), strict=True):
            count = int(np.count_nonzero(mask))
            some[:, cell][mask] += escapes[at : at + count]
            at += count
    return values


def _mask(low: UInt8[np.ndarray, "columns 1"]) -> Int32[np.ndarray, "columns 1"]:
    return (np.int32(1) << low.astype(np.int32)) - np.int32(1)


def _fold(levels: Int32[np.ndarray, "..."]) -> Int32[np.ndarray, "..."]:
    return levels << 1 ^ levels >> 31


def _unfold(folded: Int32[np.ndarray, "..."]) -> Int32[np.ndarray, "..."]:
    return folded >> 1 ^ -(folded & 1)
