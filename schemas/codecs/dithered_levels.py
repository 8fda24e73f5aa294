"""Levels of a sketch that is rounded with dither, coded with what the dither tells of them.

A level is the nearest whole number to x + u, where x is the number in steps and u the dither of its
position, in (−½, ½). In a *narrow* column, whose spread s is about a step or less, that is 0 unless
u is near an edge, ½ or −½: then it is 0 or the next number on that side. So levels of narrow
columns are taken with the sign of u; columns of about the same spread form a group, and in each
group the positions whose u is near an edge are a class, those far from both another. Positions are
sorted by their way ½ − |u| to the edge and columns by their spread, so that the levels of a class
are blocks of neighbours. They share a zstd frame. Of wide columns u tells nothing: they are stored
by `sketch_levels.py`.
"""

import struct
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
_GROUPS = 6
"""Group i holds the columns whose spread is below `_NARROW`/2ⁱ and at least half of that, the last
one all that are left."""
_EDGE = 0.5
"""Where the classes of a group part: this share of its greatest spread away from the edge."""
_PER_BYTE = (2, 2, 4, 4, 8, 8)
"""Levels that share a byte: of both classes of the first group, of the second, and of all others. A
digit is at most the largest that has room; levels beyond it are listed apart."""
_HALF = 1 << 15
_FURTHEST = (1 << 24) - 1
"""Largest distance of an entry of the list of such levels from the one before."""
_COUNT = struct.Struct("<I")
_ENDS = np.ceil(2 * _HALF * _EDGE * _NARROW / 2.0 ** np.arange(_GROUPS) - 0.5).astype(np.uint16)
"""`_way` of the far class of each group is at least this."""
_FIXED = 5
"""Sections in front of the frames."""


@dataclass(frozen=True, eq=False)
class _Layout:
    """How each column is stored; a function of the columns' spreads."""

    wide: Integer[np.ndarray, " wide"]
    narrow: Integer[np.ndarray, " narrow"]
    """By spread, the largest first."""
    groups: tuple[slice, ...]
    """Of the narrow columns so sorted."""

    def blocks(self, way: UInt16[np.ndarray, " n"]) -> list[list[tuple[slice, slice]]]:
        """For each frame the blocks of its levels among the sorted positions and columns."""
        ends = np.searchsorted(way, _ENDS).tolist()
        near = [(slice(0, end), own) for end, own in zip(ends, self.groups, strict=True)]
        far = [(slice(end, len(way)), own) for end, own in zip(ends, self.groups, strict=True)]
        return [near[:1], far[:1], near[1:2], far[1:2], near[2:], far[2:]]


def _layout(spreads: Float[np.ndarray, " r"]) -> _Layout:
    order = np.argsort(-spreads, kind="stable")
    narrow = order[spreads[order] < _NARROW]
    least = [_NARROW / 2**i for i in range(1, _GROUPS)]  # exact: all machines agree
    ends = [int(np.count_nonzero(spreads[narrow] >= bound)) for bound in least]
    groups = (slice(*pair) for pair in pairwise([0, *ends, len(narrow)]))
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

    u is (dither + ½)/2¹⁶ − ½. Sections: the payload of the wide columns; the list of levels beyond
    their digits (how many, raw bits, symbols of distances, symbols of excesses); a frame for each
    class of the first group, of the second, and of all others.
    """
    layout = _layout(spreads)
    order, way = _sorted(dither)
    limit = sketch_levels.LARGEST
    whole = np.clip(levels[:, layout.narrow], -limit, limit).astype(np.int32)
    whole[dither < _HALF] *= -1
    folded = fold(whole)[order]
    held, frames = np.empty_like(folded), []
    for blocks, per_byte in zip(layout.blocks(way), _PER_BYTE, strict=True):
        for block in blocks:
            held[block] = np.minimum(folded[block], (1 << 8 // per_byte) - 1)
        digits = np.concatenate([held[block].reshape(-1) for block in blocks])
        frames.append(compress(_pack(digits, per_byte)))
    excess = (folded - held).reshape(-1)
    beyond = np.flatnonzero(excess)
    # Entries without an excess between those that are too far apart.
    steps = np.arange(_FURTHEST, excess.size, _FURTHEST)
    beyond = np.union1d(beyond, steps) if len(steps) else beyond
    listed = np.concatenate([np.diff(beyond, prepend=-1) - 1, excess[beyond]])
    symbols, raw = numbers.encode(listed)
    distances, excesses = np.split(symbols, 2)
    of_wide = sketch_levels.encode(levels.T[layout.wide], spreads=spreads[layout.wide])
    count = _COUNT.pack(len(beyond))
    return join([of_wide, count, raw, compress(distances), compress(excesses), *frames])


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
    of_wide, sizes, raw, distances, excesses = ([own[i] for own in sections] for i in range(_FIXED))
    wide = sketch_levels.decode(of_wide, positions=positions, spreads=spreads[layout.wide])
    counts = [
        _count(size, most=n * len(layout.narrow)) for size, n in zip(sizes, positions, strict=True)
    ]
    symbols = [grid_of(decompress(of, sizes=counts), counts) for of in (distances, excesses)]
    listed = numbers.decode(np.concatenate(symbols), raw)
    wide_columns, narrow_columns = _span(layout.wide), _span(layout.narrow)
    # One record at a time fits into a processor's cache.
    for levels, own, dither, cell, of_list in zip(
        out, sections, dithers, cells(positions), cells(counts), strict=True
    ):
        order, way = _sorted(dither)
        sign = np.where(dither < _HALF, -1, 1).astype(np.int8)
        in_order = _read_frames(own[_FIXED:], layout.blocks(way), (len(way), len(layout.narrow)))
        narrow = np.empty_like(in_order)
        narrow[order] = in_order
        narrow *= sign[:, None]
        levels[:, wide_columns] = wide[:, cell].T
        levels[:, narrow_columns] = narrow
        distance, excess = listed[:, of_list]
        beyond = np.cumsum(distance + 1, dtype=np.int64) - 1
        if len(beyond) and beyond[-1] >= in_order.size:
            raise ValueError(f"number {beyond[-1]} of a sketch's {in_order.size}")
        rows, places = np.divmod(beyond, max(in_order.shape[1], 1))
        whole = _unfold(fold(in_order.reshape(-1)[beyond].astype(np.int32)) + excess)
        rows = order[rows]
        levels[rows, layout.narrow[places]] = sign[rows] * whole
        yield levels


def _count(section: bytes, *, most: int) -> int:
    """How many entries a list has."""
    if len(section) != _COUNT.size:
        raise ValueError(f"a list's length in {len(section)} bytes; expected {_COUNT.size}")
    (count,) = _COUNT.unpack(section)
    if count > most:
        raise ValueError(f"a list of {count} of a sketch's {most} numbers")
    return count


def _read_frames(
    frames: Sequence[bytes], blocks: list[list[tuple[slice, slice]]], shape: tuple[int, int]
) -> Int8[np.ndarray, "n narrow"]:
    """What the digits say of the levels with the sign of the dither, positions and columns
    sorted."""
    out = np.empty(shape, np.int8)
    counts = [sum(out[block].size for block in some) for some in blocks]
    sizes = [-(-count // each) for count, each in zip(counts, _PER_BYTE, strict=True)]
    packed = decompress(frames, sizes=sizes)
    for some, span, per_byte, count in zip(blocks, spans(sizes), _PER_BYTE, counts, strict=True):
        unpacked, at = _unpack(packed[span], per_byte, count), 0
        for block in some:
            of_block = out[block]
            of_block[...] = unpacked[at : at + of_block.size].reshape(of_block.shape)
            at += of_block.size
    return out


def _span(columns: Integer[np.ndarray, " columns"]) -> slice | np.ndarray:
    """The columns as a slice if they are neighbours in order: numpy fills it in half the time."""
    first = int(columns[0]) if len(columns) else 0
    own = np.arange(first, first + len(columns))
    return slice(first, first + len(columns)) if (columns == own).all() else columns


def fold(levels: Int32[np.ndarray, "..."]) -> Int32[np.ndarray, "..."]:
    """0, 1, −1, 2, −2 … become 0, 1, 2, 3, 4 …."""
    return 2 * np.abs(levels) - (levels > 0)


def _unfold(folded: Integer[np.ndarray, "..."]) -> Integer[np.ndarray, "..."]:
    """The levels that `fold` was given."""
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
    return _unfold(digits).astype(np.int8).view(f"u{per_byte}")[:, 0]


def _unpack(
    packed: UInt8[np.ndarray, " bytes"], per_byte: int, count: int
) -> Int8[np.ndarray, " count"]:
    levels = _levels_of_bytes(per_byte).take(packed).view(np.int8)
    if count < len(levels) and levels[count:].any():
        raise ValueError(f"a number of a sketch beyond the {count} of its class")
    return levels[:count]
