"""Levels of a sketch whose columns have a dither each, as release 0.15 stored them.

A level is the nearest whole number to x + u, where x is the number in steps and u the dither in
(−½, ½). In a *narrow* column, whose spread s is about a step or less, that is 0 unless u is near an
edge, ½ or −½: then it is 0 or the next number on that side. So levels of narrow columns are taken
with the sign of u, and sorted into classes by (½ − |u|)/s, the way to the edge in deviations. The
levels of a class, whatever their column, share a zstd frame. Of wide columns u tells nothing: they
are stored by `sketch_levels.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Integer, UInt8, UInt16

from decant.schemas.codecs import numbers, sketch_levels
from decant.schemas.codecs.dithered_levels import fold
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
_EDGES = (0.4, 1.0, 2.0, 3.0)
"""Ways to the edge, in deviations, that part the classes."""
_GROUPS = ((0.0, 0.4, (4, 4, 4, 8, 8)), (0.4, _NARROW, (2, 2, 2, 2, 2)))
"""Least and greatest spread of a group of narrow columns, and how many levels of each class share a
byte. A byte takes at least one bit. A level too large for its digit is stored apart."""
_CLASSES = len(_EDGES) + 1
_HALF = 1 << 15
_FIXED = 3
"""Sections in front of the frames."""


@dataclass(frozen=True, eq=False)
class _Group:
    """Narrow columns whose classes are coded alike."""

    columns: Integer[np.ndarray, " columns"]
    per_byte: tuple[int, ...]
    """Levels that share a byte, of each class."""
    edges: UInt16[np.ndarray, "edges columns 1"]
    """What `_way` is at least in the class after each edge."""

    def classes(self, way: UInt16[np.ndarray, "columns n"]) -> UInt8[np.ndarray, "columns n"]:
        """The class of each number."""
        out = np.zeros(way.shape, np.uint8)
        for edge in self.edges:
            out += way >= edge
        return out


def _groups(spreads: Float[np.ndarray, " r"]) -> list[_Group]:
    groups = []
    for least, below, per_byte in _GROUPS:
        columns = np.flatnonzero((spreads >= least) & (spreads < below))
        # Products and roundings of float64 alone: all machines agree.
        edges = np.multiply.outer(_EDGES, spreads[columns]) * (2 * _HALF) - 0.5
        edges = np.clip(np.ceil(edges), 0, _HALF).astype(np.uint16)
        groups.append(_Group(columns, per_byte, edges[:, :, None]))
    return groups


def _way(dither: UInt16[np.ndarray, "columns n"]) -> UInt16[np.ndarray, "columns n"]:
    """From the nearer edge, in units of 2⁻¹⁶ steps, less a half: 0 to 32767."""
    return np.minimum(dither, ~dither)


def encode(
    levels: Float[np.ndarray, "r n"],
    *,
    dither: UInt16[np.ndarray, "r n"],
    spreads: Float[np.ndarray, " r"],
) -> bytes:
    """The payload of one record. `spreads` are the columns' standard deviations in steps.

    u is (dither + ½)/2¹⁶ − ½. Sections: the payload of the wide columns; escapes (raw bits,
    symbols); a frame for each class of each group.
    """
    wide = spreads >= _NARROW
    frames: list[bytes] = []
    beyond = [np.zeros(0, np.int32)]
    limit = sketch_levels.LARGEST
    for group in _groups(spreads):
        of_group = dither[group.columns]
        whole = np.clip(levels[group.columns], -limit, limit).astype(np.int32)
        folded = fold(np.where(of_group < _HALF, -whole, whole))
        classes = group.classes(_way(of_group))
        for number, per_byte in enumerate(group.per_byte):
            of_class = folded[classes == number]
            largest = (1 << 8 // per_byte) - 1
            frames.append(compress(_pack(np.minimum(of_class, largest), per_byte)))
            beyond.append(of_class[of_class >= largest] - largest)
    symbols, raw = numbers.encode(np.concatenate(beyond))
    of_wide = sketch_levels.encode(levels[wide], spreads=spreads[wide])
    return join([of_wide, raw, compress(symbols), *frames])


def decode(
    payloads: Sequence[bytes],
    *,
    dithers: Sequence[UInt16[np.ndarray, "r _"]],
    spreads: Float[np.ndarray, " r"],
) -> Iterator[Float32[np.ndarray, "r n"]]:
    """The levels of each record. ValueError for damaged payloads."""
    # One record at a time fits into a processor's cache.
    positions = [dither.shape[1] for dither in dithers]
    groups = _groups(spreads)
    sections = [split(payload, count=_FIXED + _CLASSES * len(groups)) for payload in payloads]
    wide = spreads >= _NARROW
    levels_of_wide = sketch_levels.decode(
        [first for first, *_ in sections], positions=positions, spreads=spreads[wide]
    )
    for (_, *of_narrow), dither, cell in zip(sections, dithers, cells(positions), strict=True):
        out = np.empty(dither.shape, np.float32)
        out[wide] = levels_of_wide[:, cell]
        _decode_narrow(of_narrow, groups, dither, out)
        yield out


def _decode_narrow(
    sections: Sequence[bytes],
    groups: Sequence[_Group],
    dither: UInt16[np.ndarray, "r n"],
    out: Float32[np.ndarray, "r n"],
) -> None:
    """Fill the narrow columns of one record."""
    raw, escapes, *frames = sections
    narrow = [dither[group.columns] for group in groups]
    # Numbers and not masks: numpy fills by them in a third of the time.
    places = [
        np.flatnonzero(classes == number)
        for group, of_group in zip(groups, narrow, strict=True)
        for classes in (group.classes(_way(of_group)),)
        for number in range(_CLASSES)
    ]
    per_byte = [each for group in groups for each in group.per_byte]
    sizes = [-(-len(some) // each) for some, each in zip(places, per_byte, strict=True)]
    flat = decompress(frames, sizes=sizes)
    digits = [
        _unpack(flat[span], each, len(some))
        for span, each, some in zip(spans(sizes), per_byte, places, strict=True)
    ]
    escaped = [
        np.flatnonzero(some == (1 << 8 // each) - 1)
        for some, each in zip(digits, per_byte, strict=True)
    ]
    excess = _numbers(raw, escapes, sum(map(len, escaped)))
    beyond = np.split(excess, np.cumsum([len(some) for some in escaped])[:-1])
    for number, (group, of_group) in enumerate(zip(groups, narrow, strict=True)):
        classes = range(number * _CLASSES, (number + 1) * _CLASSES)
        folded = np.empty(of_group.shape, np.uint8)
        for at in classes:
            folded.reshape(-1)[places[at]] = digits[at]
        levels = _unfold(folded, negated=of_group < _HALF)
        for at in classes:
            where = places[at][escaped[at]]
            whole = beyond[at] + (1 << 8 // per_byte[at]) - 1
            levels.reshape(-1)[where] = _unfold(whole, negated=of_group.reshape(-1)[where] < _HALF)
        out[group.columns] = levels


def _numbers(raw: bytes, symbols: bytes, count: int) -> Int32[np.ndarray, " count"]:
    of_grid = grid_of(decompress([symbols], sizes=[count]), [count])
    return numbers.decode(of_grid, [raw])[0, :count]


def _unfold(
    folded: Integer[np.ndarray, "*shape"], *, negated: Bool[np.ndarray, "*shape"]
) -> Float32[np.ndarray, "*shape"]:
    """The levels, negated where they were for `fold`."""
    # On bytes this is a tenth of the time of a table.
    signed = np.int8 if folded.dtype == np.uint8 else np.int32
    below = ((folded & 1 == 0) ^ negated).view(np.int8).astype(signed)
    return ((folded + 1 >> 1).astype(signed) * (1 - 2 * below)).astype(np.float32)


def _pack(digits: Int32[np.ndarray, " count"], per_byte: int) -> UInt8[np.ndarray, " bytes"]:
    """Byte i holds digits i, i + h, i + 2·h … of h bytes, the first in its lowest bits."""
    height = -(-len(digits) // per_byte)
    rows = np.zeros((per_byte, height), np.uint8)
    rows.reshape(-1)[: len(digits)] = digits
    out = rows[0]
    for place in range(1, per_byte):
        out = out | rows[place] << np.uint8(place * (8 // per_byte))
    return out


def _unpack(
    packed: UInt8[np.ndarray, " bytes"], per_byte: int, count: int
) -> UInt8[np.ndarray, " count"]:
    shifts = np.arange(per_byte, dtype=np.uint8)[:, None] * np.uint8(8 // per_byte)
    digits = (packed >> shifts & np.uint8((1 << 8 // per_byte) - 1)).reshape(-1)
    if digits[count:].any():
        raise ValueError(f"a number of a sketch beyond the {count} of its class")
    return digits[:count]
