"""Levels of a sketch that is rounded with dither, coded with what the dither tells of them.

A level is the nearest whole number to x + u, where x is the number in steps and u the dither of its
position, in (−½, ½). In a *narrow* column, whose spread s is about a step or less, that is 0 unless
u is near an edge, ½ or −½: then it is 0 or the next number on that side. So levels of narrow
columns are taken with the sign of u, and sorted into classes by (½ − |u|)/s, the way to the edge in
deviations. Positions are sorted by their way and columns by their spread, so that the levels of a
class are a few blocks of neighbours. They share a zstd frame. Of wide columns u tells nothing: they
are stored by `sketch_levels.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Float32, Int8, Int32, Integer, Shaped, UInt8, UInt16

from decant.schemas.codecs import numbers, sketch_levels
from decant.schemas.codecs.streams import (
    cells,
    compress,
    decompress,
    grid_of,
    join,
    spans,
    split,
)

_NARROW = 1.1
"""Columns of smaller spread are narrow."""
_RATIO = 0.8
"""Least spread of a group of columns, of its greatest."""
_MOST_GROUPS = 12
"""The last one holds all columns of less spread than the others."""
_EDGES = (0.4, 1.0, 1.8)
"""Ways to the edge, in deviations, that part the classes."""
_MIDDLE = 0.85
"""What stands for the spread of all columns of a group, of its greatest."""
_FINE = 0.5
"""Columns of smaller spread need fewer bits."""
_PER_BYTE = (2, 2, 2, 2, 4, 4, 8, 8)
"""Levels that share a byte: of each class of the columns above `_FINE`, and of those below. A byte
takes at least one bit. A level too large for its digit is stored apart."""
_CLASSES = len(_EDGES) + 1
_HALF = 1 << 15
_BEYOND = -128
"""The largest digit, whose level is stored apart, is unpacked as a level that is it less 128."""
_NONE = np.zeros(0, np.int32)
_FIXED = 3
"""Sections in front of the frames."""


@dataclass(frozen=True, eq=False)
class _Group:
    """Narrow columns of about the same spread, neighbours among the sorted ones."""

    columns: slice
    fine: bool
    edges: UInt16[np.ndarray, " edges"]
    """What `_way` is at least in the class after each edge."""


@dataclass(frozen=True, eq=False)
class _Layout:
    """How each column is stored; a function of the columns' spreads."""

    wide: Integer[np.ndarray, " wide"]
    narrow: Integer[np.ndarray, " narrow"]
    """By spread, the largest first."""
    groups: tuple[_Group, ...]

    def blocks(self, way: UInt16[np.ndarray, " n"]) -> list[list[tuple[slice, slice]]]:
        """For each frame the blocks of its levels among the sorted positions and columns."""
        frames: list[list[tuple[slice, slice]]] = [[] for _ in range(len(_PER_BYTE))]
        if self.groups:
            ends = np.searchsorted(way, np.stack([group.edges for group in self.groups]))
            for group, edges in zip(self.groups, ends.tolist(), strict=True):
                for number, (start, end) in enumerate(pairwise([0, *edges, len(way)])):
                    if end > start:
                        block = slice(start, end), group.columns
                        frames[group.fine * _CLASSES + number].append(block)
        return frames


def _layout(spreads: Float[np.ndarray, " r"]) -> _Layout:
    order = np.argsort(-spreads, kind="stable")
    narrow = order[spreads[order] < _NARROW]
    groups, greatest, start = [], _NARROW, 0
    for number in range(_MOST_GROUPS):
        least = greatest * _RATIO if number < _MOST_GROUPS - 1 else -1.0
        # Products and roundings of float64 alone: all machines agree.
        end = start + int(np.count_nonzero(spreads[narrow[start:]] >= least))
        if end > start:
            edges = np.array(_EDGES) * (greatest * _MIDDLE) * (2 * _HALF) - 0.5
            edges = np.clip(np.ceil(edges), 0, _HALF).astype(np.uint16)
            groups.append(_Group(slice(start, end), greatest < _FINE, edges))
        greatest, start = least, end
    return _Layout(np.flatnonzero(spreads >= _NARROW), narrow, tuple(groups))


def _sorted(dither: UInt16[np.ndarray, " n"]) -> tuple[np.ndarray, UInt16[np.ndarray, " n"]]:
    """The positions by their way to the nearer edge, and these ways in units of 2⁻¹⁶ steps, less a
    half: 0 to 32767."""
    way = np.minimum(dither, ~dither)
    order = np.argsort(way, kind="stable")
    return order, way[order]


def encode(
    levels: Float[np.ndarray, "n r"],
    *,
    dither: UInt16[np.ndarray, " n"],
    spreads: Float[np.ndarray, " r"],
) -> bytes:
    """The payload of one record. `spreads` are the columns' standard deviations in steps.

    u is (dither + ½)/2¹⁶ − ½. Sections: the payload of the wide columns; escapes (raw bits,
    symbols); a frame for each class of the columns above `_FINE`, and of those below.
    """
    layout = _layout(spreads)
    order, way = _sorted(dither)
    limit = sketch_levels.LARGEST
    whole = np.clip(levels[:, layout.narrow], -limit, limit).astype(np.int32)
    whole[dither < _HALF] *= -1
    folded = _fold(whole)[order]
    excess = np.full_like(folded, -1)
    frames: list[bytes] = []
    for blocks, per_byte in zip(layout.blocks(way), _PER_BYTE, strict=True):
        largest = (1 << 8 // per_byte) - 1
        for block in blocks:
            excess[block] = folded[block] - largest
        digits = [np.minimum(folded[block], largest).reshape(-1) for block in blocks]
        frames.append(compress(_pack(np.concatenate([_NONE, *digits]), per_byte)))
    symbols, raw = numbers.encode(excess[excess >= 0])
    of_wide = sketch_levels.encode(levels.T[layout.wide], spreads=spreads[layout.wide])
    return join([of_wide, raw, compress(symbols), *frames])


def decode(
    payloads: Sequence[bytes],
    *,
    dithers: Sequence[UInt16[np.ndarray, " _"]],
    spreads: Float[np.ndarray, " r"],
    out: Sequence[Float32[np.ndarray, "_ r"]],
) -> Iterator[Float32[np.ndarray, "n r"]]:
    """Fill `out[i]` with the levels of record i, and yield it. ValueError for damaged payloads."""
    layout, positions = _layout(spreads), [len(dither) for dither in dithers]
    sections = [split(payload, count=_FIXED + len(_PER_BYTE)) for payload in payloads]
    of_wide, raw, escapes = ([some[i] for some in sections] for i in range(_FIXED))
    levels_of_wide = sketch_levels.decode(
        of_wide, positions=positions, spreads=spreads[layout.wide]
    )
    read = [
        _Narrow.read(some[_FIXED:], layout, dither)
        for some, dither in zip(sections, dithers, strict=True)
    ]
    counts = [len(of_record.beyond) for of_record in read]
    symbols = grid_of(decompress(escapes, sizes=counts), counts)
    excess = numbers.decode(symbols, raw)[0]
    # One record at a time fits into a processor's cache.
    columns = _span(layout.narrow)
    for levels, of_record, cell, of_escapes in zip(
        out, read, cells(positions), cells(counts), strict=True
    ):
        levels[:, layout.wide] = levels_of_wide[:, cell].T
        of_record.fill(levels, columns, excess[of_escapes])
        yield levels


@dataclass(frozen=True, eq=False)
class _Narrow:
    """The levels of the narrow columns of one record, but those too large for their digits."""

    order: Integer[np.ndarray, " n"]
    sign: Int8[np.ndarray, " n"]
    sorted: Int8[np.ndarray, "n narrow"]
    """Levels with the sign of the dither, positions and columns sorted."""
    beyond: Integer[np.ndarray, " escapes"]
    """Where levels are too large for their digits."""

    @staticmethod
    def read(
        frames: Sequence[bytes], layout: _Layout, dither: UInt16[np.ndarray, " n"]
    ) -> "_Narrow":
        order, way = _sorted(dither)
        blocks = layout.blocks(way)
        counts = [sum((a.stop - a.start) * (b.stop - b.start) for a, b in some) for some in blocks]
        sizes = [-(-count // each) for count, each in zip(counts, _PER_BYTE, strict=True)]
        packed = decompress(frames, sizes=sizes)
        levels = np.empty((len(dither), len(layout.narrow)), np.int8)
        for some, span, per_byte, count in zip(
            blocks, spans(sizes), _PER_BYTE, counts, strict=True
        ):
            unpacked, at = _unpack(packed[span], per_byte, count), 0
            for block in some:
                of_block = levels[block]
                of_block[...] = unpacked[at : at + of_block.size].reshape(of_block.shape)
                at += of_block.size
        sign = np.where(dither < _HALF, -1, 1).astype(np.int8)
        return _Narrow(order, sign, levels, np.flatnonzero(levels.reshape(-1) < _BEYOND // 2))

    def fill(
        self,
        out: Float32[np.ndarray, "n r"],
        columns: slice | Integer[np.ndarray, " narrow"],
        excess: Int32[np.ndarray, " escapes"],
    ) -> None:
        """Put the levels into the columns of `out`; `excess` is what is above the digits."""
        levels = np.empty_like(self.sorted)
        levels[self.order] = self.sorted
        levels *= self.sign[:, None]
        out[:, columns] = levels
        rows, places = np.divmod(self.beyond, max(self.sorted.shape[1], 1))
        rows, folded = self.order[rows], self.sorted.reshape(-1)[self.beyond] - np.int32(_BEYOND)
        places = places + columns.start if isinstance(columns, slice) else columns[places]
        out[rows, places] = self.sign[rows] * _unfold(folded + excess)


def _span(columns: Integer[np.ndarray, " columns"]) -> slice | np.ndarray:
    """The columns as a slice if they are neighbours in order: numpy fills it in half the time."""
    first = int(columns[0]) if len(columns) else 0
    own = np.arange(first, first + len(columns))
    return slice(first, first + len(columns)) if (columns == own).all() else columns


def _fold(levels: Int32[np.ndarray, "..."]) -> Int32[np.ndarray, "..."]:
    """0, 1, −1, 2, −2 … become 0, 1, 2, 3, 4 …."""
    return 2 * np.abs(levels) - (levels > 0)


def _unfold(folded: Integer[np.ndarray, "..."]) -> Integer[np.ndarray, "..."]:
    return np.where(folded & 1, 1, -1) * (folded + 1 >> 1)


def _pack(digits: Integer[np.ndarray, " count"], per_byte: int) -> UInt8[np.ndarray, " bytes"]:
    """Neighbours share a byte, the first in its lowest bits."""
    padded = np.zeros(-(-len(digits) // per_byte) * per_byte, np.uint8)
    padded[: len(digits)] = digits
    places = np.arange(per_byte, dtype=np.uint8) * np.uint8(8 // per_byte)
    return np.bitwise_or.reduce(padded.reshape(-1, per_byte) << places, axis=1)


@lru_cache
def _levels_of_bytes(per_byte: int) -> Shaped[np.ndarray, "256"]:
    """The levels that share each byte, as one number of `per_byte` bytes."""
    bits = 8 // per_byte
    digits = np.arange(256)[:, None] >> bits * np.arange(per_byte) & (1 << bits) - 1
    levels = np.where(digits == (1 << bits) - 1, digits + _BEYOND, _unfold(digits))
    return levels.astype(np.int8).view(f"u{per_byte}")[:, 0]


def _unpack(
    packed: UInt8[np.ndarray, " bytes"], per_byte: int, count: int
) -> Int8[np.ndarray, " count"]:
    levels = _levels_of_bytes(per_byte).take(packed).view(np.int8)
    if count < len(levels) and levels[count:].any():
        raise ValueError(f"a number of a sketch beyond the {count} of its class")
    return levels[:count]
