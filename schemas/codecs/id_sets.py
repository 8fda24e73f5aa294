"""Codec of sets of ids, of any sizes, for the positions of a record.

Sorted by place in one of many orders (`codebook.py`), the ids of a set have small gaps. A gap is
stored as a symbol for zstd's entropy stage and raw low bits (`numbers.py`). Symbols are stored by
context, the size of the set and the gap's place in it, and cut into frames: each holds alike
distributions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, Integer, UInt8

from decant.schemas.codecs import numbers
from decant.schemas.codecs.block import Tables
from decant.schemas.codecs.clusters import choose_orders
from decant.schemas.codecs.codebook import codebook
from decant.schemas.codecs.fast import fit as fit_order
from decant.schemas.codecs.flags import stable_order
from decant.schemas.codecs.streams import (
    cells,
    column_runs,
    compress,
    decompress,
    escape,
    fill_columns,
    gather_columns,
    grid,
    grid_of,
    run_heights,
    spans,
    unescape,
)

SECTIONS = 4
"""Sections of a record besides its frames."""
MOST_FRAMES = 4
_ENTRIES_PER_FRAME = 2048
"""Fewest entries in a zstd frame, so that the frame's own Huffman table pays off."""
_MOST_LISTED = 1 << 16
"""Limit on ranks, because orders store them as uint16."""
_EDGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
"""Where the next kind of a size, or of a place in a set, begins."""
KINDS = len(_EDGES) + 1
_LARGEST = 1024
_KIND = np.searchsorted(_EDGES, np.arange(_LARGEST + 1), side="right")
_PRIOR = 4.0
"""Weight, in entries, of all contexts with the same place in each context."""


@dataclass(frozen=True, eq=False)
class Entries:
    """The ids of all sets, one after another, and the order in which their streams are stored."""

    sizes: Int64[np.ndarray, " n"]
    starts: Int64[np.ndarray, " n"]
    """The number of the first id of each set."""
    order: Int64[np.ndarray, " all"]
    """Ids in the order in which streams store them: record by record, in each by context."""
    of_record: list[int]
    """The number of ids in each record."""

    @classmethod
    def of(
        cls, sizes: Integer[np.ndarray, " n"], *, records: Sequence[int], tables: Tables
    ) -> "Entries":
        """Of sets with these sizes; record i has `records[i]` positions."""
        sizes = sizes.astype(np.int64)
        ends = np.cumsum(sizes)
        starts = ends - sizes
        contexts = tables.compute_once("contexts by place", _contexts_by_place)
        # The row of the set's size begins `starts` before, so that ids count on in their row.
        at = np.repeat(contexts.shape[1] * _KIND[sizes] - starts, sizes)
        at += np.arange(len(at))
        of_record = np.diff(ends[np.cumsum(records) - 1], prepend=0).tolist()
        order = stable_order(contexts.reshape(-1).take(at), of_record)
        return cls(sizes, starts, order, of_record)

    @property
    def first(self) -> Bool[np.ndarray, " all"]:
        """Whether an id is the first of its set."""
        first = np.zeros(len(self.order), bool)
        first[self.starts[self.sizes > 0]] = True
        return first


def fit(sets: Integer[np.ndarray, "n w"], *, vocabulary: int) -> dict[str, np.ndarray]:
    """The tables `order`, `orders` and `contexts`, from a sample of sets padded with `vocabulary`.

    Deterministic.
    """
    held = sets < vocabulary
    order = fit_order(sets[held][:, None], vocabulary=vocabulary)["order"][:_MOST_LISTED]
    if not len(order):
        order = np.zeros(1, np.int32)

    def cost(orders: np.ndarray, judged: Integer[np.ndarray, "n w"]) -> int:
        tables = Tables({"order": order, "orders": orders})
        return sum(
            sum(map(len, _encode_gaps(part, tables, vocabulary=vocabulary)))
            for part in np.array_split(judged, 1 + len(judged) // 1024)
        )

    orders = choose_orders(sets, order=order, vocabulary=vocabulary + 1, cost=cost)
    tables = Tables({"order": order, "orders": orders})
    gaps, _, _ = _gaps(sets, tables, vocabulary=vocabulary)
    return {**tables.arrays(), "contexts": _contexts(gaps, held.sum(1))}


def _contexts_by_place(tables: Tables) -> UInt8[np.ndarray, "kinds places"]:
    """The contexts of each kind of size, by place in the set."""
    return tables["contexts"].reshape(KINDS, KINDS)[:, _KIND[:_LARGEST]]


def _contexts(gaps: Integer[np.ndarray, " all"], sizes: Int64[np.ndarray, " n"]) -> np.ndarray:
    """The rank of each context by its gaps' mean bits, uint8 [kinds of size · kinds of place]."""
    place = np.arange(len(gaps)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    at = (np.repeat(_KIND[sizes], sizes), _KIND[place])
    sums, counts = np.zeros((2, KINDS, KINDS))
    np.add.at(sums, at, np.log2(gaps + 1.0))
    np.add.at(counts, at, 1.0)
    of_place = sums.sum(0) / np.maximum(counts.sum(0), 1)
    mean = (sums + _PRIOR * of_place) / (counts + _PRIOR)
    rank = np.empty(mean.size, np.int64)
    rank[np.argsort(mean.reshape(-1), kind="stable")] = np.arange(mean.size)
    return (rank * 256 // mean.size).astype(np.uint8)


def encode(
    sets: Integer[np.ndarray, "n w"], *, tables: Tables, vocabulary: int
) -> tuple[list[bytes], Integer[np.ndarray, " all"], Entries]:
    """The sections of one record, in order of places the slots of its ids, and its entries.

    `sets` holds `vocabulary` in empty slots. Sections: sizes, their escapes, orders, raw bits, then
    frames of symbols. A slot is an index into the flattened `sets`.
    """
    gaps, chosen, slots = _gaps(sets, tables, vocabulary=vocabulary)
    sizes = (sets < vocabulary).sum(1)
    entries = Entries.of(sizes, records=[len(sets)], tables=tables)
    symbols, raw = numbers.encode(gaps[entries.order])
    codes, escapes = escape(sizes)
    runs = column_runs(max(len(symbols), 1), frame_count(len(symbols)))
    sections = [
        compress(codes),
        escapes,
        compress(chosen.astype(np.uint8)),
        raw,
        *(compress(symbols[run]) for run in runs),
    ]
    return sections, slots, entries


def frame_count(ids: int) -> int:
    """Number of frames of symbols of a record with this number of ids."""
    return max(1, min(MOST_FRAMES, ids // _ENTRIES_PER_FRAME))


def decode(
    sections: Sequence[Sequence[bytes]],
    *,
    positions: Sequence[int],
    tables: Tables,
    vocabulary: int,
) -> tuple[Integer[np.ndarray, " all"], Entries]:
    """The ids of all sets in order of their places, records one after another, and their entries.

    `sections[i]` are record i's. ValueError for damaged sections.
    """
    sizes = _decode_sizes(sections, positions=positions)
    entries = Entries.of(sizes, records=positions, tables=tables)
    of_record = entries.of_record
    chosen = decompress([own[2] for own in sections], sizes=positions)
    symbols, raw = grid(1, of_record), [own[3] for own in sections]
    for cell, own, count in zip(cells(of_record), sections, of_record, strict=True):
        frames = own[SECTIONS:]
        if len(frames) != frame_count(count):
            raise ValueError(f"{len(frames)} frames of {count} ids")
        heights = run_heights(max(count, 1), len(frames)) if count else [0]
        fill_columns(symbols[:, cell], decompress(frames, sizes=heights), [count])
    book = codebook(tables, vocabulary=vocabulary + 1)
    if chosen.max() >= book.orders:
        raise ValueError(f"order {chosen.max()} of {book.orders}")
    # The sum over all sets may wrap around; a difference of two of them does not.
    sums = np.zeros(1 + len(entries.order), np.uint32)
    places, (gaps,) = sums[1:], numbers.decode(symbols, raw)
    for cell, span in zip(cells(of_record), spans(of_record), strict=True):
        places[entries.order[span]] = gaps[cell]
    places += np.uint32(1)
    np.cumsum(places, out=places)
    before = sums.take(entries.starts)
    before += np.uint32(1)  # the first place of a set is its gap
    places -= np.repeat(before, sizes)
    if places.max(initial=0) >= book.depth + vocabulary:
        raise ValueError("a place is outside the vocabulary")
    ids = book.ids_from(places.view(np.int32), np.repeat(book.starts(chosen), sizes))
    if ids.max(initial=0) >= vocabulary:
        raise ValueError(f"id {ids.max()} in a vocabulary of {vocabulary}")
    return ids, entries


def _decode_sizes(
    sections: Sequence[Sequence[bytes]], *, positions: Sequence[int]
) -> Integer[np.ndarray, " total"]:
    codes = grid_of(decompress([own[0] for own in sections], sizes=positions), positions)
    sizes = unescape(codes, [own[1] for own in sections], columns=positions)
    sizes = gather_columns(sizes, positions)[0]
    if sizes.max() > _LARGEST:
        raise ValueError(f"a set of {sizes.max()} ids; expected {_LARGEST} at most")
    return sizes.astype(np.int64)


def _gaps(
    sets: Integer[np.ndarray, "n w"], tables: Tables, *, vocabulary: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gaps between places of all sets, one after another; the order of each set; slots.

    A gap is the first place of a set, then the distance from the place before it, minus one.
    """
    book = codebook(tables, vocabulary=vocabulary + 1)
    # An empty slot holds an id that no order lists and whose rank is the last: it costs the same
    # in all orders and comes last.
    chosen = book.choose(sets)
    places = book.places(sets, chosen=chosen)
    by_place = np.argsort(places, axis=1, kind="stable")
    held = np.take_along_axis(sets, by_place, 1) < vocabulary
    gaps = np.diff(np.take_along_axis(places, by_place, 1), axis=1, prepend=-1)[held] - 1
    if gaps.min(initial=0) < 0:
        raise ValueError("an id occurs twice in one set")
    slots = by_place + sets.shape[1] * np.arange(len(sets))[:, None]
    return gaps, chosen, slots[held]


def _encode_gaps(
    sets: Integer[np.ndarray, "n w"], tables: Tables, *, vocabulary: int
) -> tuple[bytes, bytes, bytes]:
    """The bytes by which orders are judged."""
    gaps, chosen, _ = _gaps(sets, tables, vocabulary=vocabulary)
    symbols, raw = numbers.encode(gaps)
    return compress(symbols), raw, compress(chosen.astype(np.uint8))
