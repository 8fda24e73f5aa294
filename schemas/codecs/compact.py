"""Codec `compact`: top-k as a set of gaps between places in one of many orders, plus levels.

Many neighbours in the top-k share a level, so their order need not be stored. Sorted by place in
the position's order, the ids have small gaps. A gap is stored as a symbol (its bit length and two
leading bits) for zstd's entropy stage, and raw low bits. Symbols are stored column by column.
Positions are split into groups by the spread of their places, so that each zstd frame holds one
distribution.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer, UInt8

from decant.schemas.codecs import numbers
from decant.schemas.codecs.block import Tables
from decant.schemas.codecs.clusters import choose_orders
from decant.schemas.codecs.codebook import codebook
from decant.schemas.codecs.fast import ID_BITS
from decant.schemas.codecs.levels import LEVEL_BITS, MINUS_INFINITY
from decant.schemas.codecs.streams import (
    cells,
    column_runs,
    compress,
    cumsum_in_place,
    decompress,
    escape,
    fill_columns,
    grid,
    join,
    run_heights,
    spans,
    split,
    unescape,
)

_MOST_LISTED = 1 << 16
"""Limit on ranks, because orders store them as uint16."""
_SYMBOL_COLUMNS = 8
_LEVEL_COLUMNS = 4
_ENTRIES_PER_FRAME = 2048
"""Fewest entries in a zstd frame, so that the frame's own Huffman table pays off."""
_MOST_GROUPS = 3
_OUT_OF_RANGE = "an order, a group or a level is outside its range"


def fit(
    ids: Integer[np.ndarray, "n k"], *, order: Integer[np.ndarray, " listed"], vocabulary: int
) -> dict[str, np.ndarray]:
    """The tables `orders` and `order`; `order` is cut to the ranks that `orders` can hold."""
    order = order[:_MOST_LISTED]

    def cost(orders: np.ndarray, judged: Integer[np.ndarray, "n k"]) -> int:
        tables = Tables({"order": order, "orders": orders})
        return sum(
            len(encode(part, np.zeros(part.shape, np.uint32), tables=tables, vocabulary=vocabulary))
            for part in np.array_split(judged, 1 + len(judged) // 1024)
        )

    orders = choose_orders(ids, order=order, vocabulary=vocabulary, cost=cost)
    return {"order": order, "orders": orders}


def encode(
    ids: Integer[np.ndarray, "n k"],
    levels: Integer[np.ndarray, "n k"],
    *,
    tables: Tables,
    vocabulary: int,
) -> bytes:
    """The payload of one record.

    The number of groups, then sections: orders, groups, levels of the last rank, escapes, raw bits,
    frames of relative levels, frames of symbols.
    """
    book = codebook(tables, vocabulary=vocabulary)
    chosen = book.choose(ids)
    places = book.places(ids, chosen=chosen)
    keys = np.sort(places.astype(np.uint64) << np.uint64(LEVEL_BITS) | levels, axis=1)
    places = (keys >> np.uint64(LEVEL_BITS)).astype(np.int32)
    n, k = ids.shape
    groups = min(_MOST_GROUPS, max(1, n * k // (_SYMBOL_COLUMNS * _ENTRIES_PER_FRAME)))
    group = _group(places, count=groups)
    by_group = np.argsort(group, kind="stable")
    places = np.ascontiguousarray(places[by_group].T)
    levels = np.ascontiguousarray(keys[by_group].T).astype(np.uint32)
    levels &= np.uint32(MINUS_INFINITY)
    last = levels.max(0)
    symbols, raw = numbers.encode(_gaps(places))
    relative, relative_escapes = escape(last - levels)
    last, last_escapes = escape(last)
    sizes = np.bincount(group, minlength=groups)
    return bytes([groups]) + join(
        [
            compress(chosen[by_group].astype(np.uint8)),
            compress(group.astype(np.uint8)),
            compress(last),
            last_escapes,
            relative_escapes,
            raw,
            *(compress(relative[rows]) for rows in column_runs(k, _LEVEL_COLUMNS)),
            *(compress(symbols[cell]) for cell in _frame_cells(k, sizes)),
        ]
    )


def decode(
    payloads: Sequence[bytes],
    *,
    positions: Sequence[int],
    k: int,
    tables: Tables,
    vocabulary: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 and levels uint32, [n, k], records one after another.

    By ascending level, ties by id.
    """
    book = codebook(tables, vocabulary=vocabulary)
    codes, symbols = grid(3 + k, positions), grid(k, positions)
    last_escapes, relative_escapes, raw = zip(
        *(
            _decompress_record(payload, codes=codes[:, cell], symbols=symbols[:, cell])
            for payload, cell in zip(payloads, cells(positions), strict=True)
        ),
        strict=True,
    )
    chosen, group, last, relative = *codes[:2], codes[2:3], codes[3:]
    last = unescape(last, last_escapes, columns=positions).astype(np.uint32, copy=False)
    if chosen.max() >= book.orders or last.max() > MINUS_INFINITY:
        raise ValueError(_OUT_OF_RANGE)
    places = numbers.decode(symbols, raw)
    places[1:] += 1
    # A sum that overflowed int32 is large as uint32 too.
    if cumsum_in_place(places).view(np.uint32).max() >= book.depth + vocabulary:
        raise ValueError("a place is outside the vocabulary")
    keys = last - unescape(relative, relative_escapes, columns=positions)
    if keys.max() > MINUS_INFINITY:  # a negative difference wrapped around
        raise ValueError("a level of log-probability is outside its range")
    keys <<= np.uint32(ID_BITS)
    keys |= book.ids(places, chosen=chosen)
    ordered = np.empty((sum(positions), k), np.uint32)
    for span, cell in zip(spans(positions), cells(positions), strict=True):
        if not group[cell].any():  # one group
            ordered[span] = keys[:, cell].T
            continue
        # Positions of a record are stored sorted by group.
        ordered[np.argsort(group[cell], kind="stable") + span.start] = keys[:, cell].T
    ordered.sort(axis=1)
    ids = (ordered & np.uint32((1 << ID_BITS) - 1)).view(np.int32)
    ordered >>= np.uint32(ID_BITS)
    return ids, ordered


def _decompress_record(
    payload: bytes, *, codes: UInt8[np.ndarray, "above n"], symbols: UInt8[np.ndarray, "k n"]
) -> tuple[bytes, bytes, bytes]:
    """Decompress one record into `codes` and `symbols`; columns are positions sorted by group.

    Rows of `codes` are orders, groups, levels of the last rank, then relative levels. Returns the
    escapes of the last levels, the escapes of the relative levels, and the raw bits.
    """
    k, n = symbols.shape
    groups = payload[0] if payload else 0
    if not 1 <= groups <= _MOST_GROUPS:
        raise ValueError(f"{groups} groups of positions; expected 1 to {_MOST_GROUPS}")
    of_levels, of_symbols = run_heights(k, _LEVEL_COLUMNS), run_heights(k, _SYMBOL_COLUMNS)
    chosen, group, last, last_escapes, relative_escapes, raw, *frames = split(
        payload, start=1, count=6 + len(of_levels) + groups * len(of_symbols)
    )
    levels, of_groups = frames[: len(of_levels)], frames[len(of_levels) :]
    sizes = [n, n, n, *(height * n for height in of_levels)]
    fill_columns(codes, decompress([chosen, group, last, *levels], sizes=sizes), [n])
    of_group = np.bincount(codes[1], minlength=groups).tolist()
    if len(of_group) > groups:
        raise ValueError(_OUT_OF_RANGE)
    sizes = [height * size for size in of_group for height in of_symbols]
    fill_columns(symbols, decompress(of_groups, sizes=sizes), of_group)
    return last_escapes, relative_escapes, raw


def _frame_cells(k: int, sizes: Integer[np.ndarray, " groups"]) -> list[tuple[slice, slice]]:
    """The (rows, columns) of each frame of symbols in [k, n], with positions sorted by group."""
    ends = np.cumsum(sizes)
    spans = [slice(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]
    return [(rows, span) for span in spans for rows in column_runs(k, _SYMBOL_COLUMNS)]


def _group(places: Integer[np.ndarray, "n k"], *, count: int) -> Integer[np.ndarray, " n"]:
    """The group of each position, of equal sizes by spread: log-places at 3/8 and 6/8 of k."""
    n, k = places.shape
    if count == 1:
        return np.zeros(n, np.intp)
    spread = np.log2(places[:, 3 * k // 8] + 1.0) + np.log2(places[:, 6 * k // 8] + 1.0)
    group = np.empty(n, np.intp)
    group[np.argsort(spread, kind="stable")] = np.arange(n) * count // n
    return group


def _gaps(places: Integer[np.ndarray, "k n"]) -> Integer[np.ndarray, "k n"]:
    """The first place, then the distance of each place from the place before it, minus one."""
    gaps = np.empty_like(places)
    gaps[0] = places[0]
    np.subtract(places[1:], places[:-1], out=gaps[1:])
    gaps[1:] -= 1
    if gaps.min() < 0:
        raise ValueError("an id occurs twice in one top-k")
    return gaps
