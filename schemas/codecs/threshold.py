"""Threshold sampling: tokens with p ≥ c and their values, and a sample of the rest that says c.

Both are one set of ids a position, of any size, stored as `compact` stores its sets: gaps
between places in the best of many orders. A number rides along with each: 0 for a sampled
token, 1 + its level for a kept one. Positions are sorted by the size of their sets, so that the
j-th gaps of all are one run.
"""

import struct

import numpy as np
from jaxtyping import Bool, Integer

from schemas.codecs import numbers
from schemas.codecs.block import Tables
from schemas.codecs.clusters import choose_orders
from schemas.codecs.codebook import Codebook, codebook
from schemas.codecs.fast import ID_BITS
from schemas.codecs.levels import LEVEL_BITS, quantiser_of
from schemas.codecs.normalise import normalised
from schemas.codecs.streams import columns, expand, join, small, split, squeeze, unsmall
from schemas.draws import Draws
from schemas.targets import Targets

STEPS = (0.03, 0.26)
"""As in levels.py, but coarser: what sampling leaves open is far more than this costs."""
_PER_NAT = 16
"""Levels of the tail's log-mass in a nat."""
_EMPTY = 65535
_MOST_LISTED = 1 << 16
_MOST_RUNS = 8
_ENTRIES_PER_RUN = 1024
_HEADER = struct.Struct("<f")
_NUMBER_BITS = LEVEL_BITS + 1
_ABSENT = np.uint64(2**64 - 1)


def nothing(vocabulary: int) -> int:
    """The id that fills a set up to the width of its array."""
    return vocabulary


def fit(targets: Targets, *, vocabulary: int) -> dict[str, np.ndarray]:
    """`steps`, `order` (ids by how often sets hold them) and `orders` of the codebook."""
    ids = _sets(targets, vocabulary=vocabulary)
    counts = np.bincount(ids.reshape(-1), minlength=vocabulary + 1)[:vocabulary]
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)][:_MOST_LISTED]
    order = order.astype(np.int32)

    def cost(orders: np.ndarray, judged: Integer[np.ndarray, "n w"]) -> int:
        book = codebook(Tables({"order": order, "orders": orders}), vocabulary=vocabulary)
        parts = np.array_split(judged, 1 + len(judged) // 1024)
        return sum(len(encode_sets(part, np.zeros_like(part), book=book)) for part in parts)

    orders = choose_orders(ids, order=order, vocabulary=vocabulary, cost=cost)
    return {"steps": np.array(STEPS), "order": order, "orders": orders}


def encode(targets: Targets, *, tables: Tables, vocabulary: int) -> bytes:
    """log c, then the tail's log-mass at T = 1, its escapes, and the sets."""
    assert targets.draws, "threshold sampling always draws"
    drawn = np.isfinite(targets.draws.logprobs)
    values = np.where(
        np.isfinite(targets.logprobs), quantiser_of(tables).levels(targets.logprobs) + 1, 0
    )
    riding = np.concatenate([values, np.zeros(drawn.shape, values.dtype)], axis=1)
    mass = targets.tail_logmass[:, 0]
    level = np.clip(np.rint(-np.where(np.isfinite(mass), mass, 0) * _PER_NAT), 0, _EMPTY - 1)
    codes, escapes = small(np.where(np.isfinite(mass), level, _EMPTY).astype(np.uint32))
    book = codebook(tables, vocabulary=vocabulary)
    sets = encode_sets(_sets(targets, vocabulary=vocabulary), riding, book=book)
    log_c = targets.draws.logprobs[drawn].max() if drawn.any() else 0.0
    return _HEADER.pack(log_c) + join([squeeze(codes), escapes, sets])


def decode(payload: bytes, *, positions: int, k: int, tables: Tables, vocabulary: int) -> Targets:
    """Kept tokens (k at most) in descending order, and as draws k + 1 sampled ones at most."""
    if len(payload) < _HEADER.size:
        raise ValueError(f"threshold sample of {len(payload)} bytes")
    (log_c,) = _HEADER.unpack_from(payload)
    codes, escapes, sets = split(payload[_HEADER.size :], count=3)
    mass = unsmall(expand(codes, size=positions), escapes)
    book = codebook(tables, vocabulary=vocabulary)
    ids, riding, there = decode_sets(sets, positions=positions, book=book, vocabulary=vocabulary)
    quantiser = quantiser_of(tables)
    if riding.max(initial=0) > len(quantiser.logprob) or not np.isfinite(log_c):
        raise ValueError("a level of log-probability outside its range")
    kept, drawn = there & (riding > 0), there & (riding == 0)
    keys = riding.astype(np.uint64) << np.uint64(ID_BITS) | ids.astype(np.uint64)
    top = _first(keys, where=kept, count=k)
    sampled = _first(ids.astype(np.uint64), where=drawn, count=k + 1)
    level = np.minimum(top >> np.uint64(ID_BITS), len(quantiser.logprob)).astype(np.int32) - 1
    logprobs = np.where(top == _ABSENT, np.float32(-np.inf), quantiser.logprob[level])
    nodes = np.where(mass == _EMPTY, -np.inf, -mass.astype(np.float32) / _PER_NAT)[:, None]
    logprobs, nodes, _ = normalised(logprobs, nodes.astype(np.float32), betas=(1.0,))
    return Targets(
        ids=_ids(top & np.uint64((1 << ID_BITS) - 1), there=top != _ABSENT),
        logprobs=logprobs,
        tail_logmass=nodes,
        draws=Draws(
            _ids(sampled, there=sampled != _ABSENT),
            np.where(sampled == _ABSENT, np.float32(-np.inf), np.float32(log_c)),
            (),
        ),
    )


def encode_sets(
    ids: Integer[np.ndarray, "n w"], riding: Integer[np.ndarray, "n w"], *, book: Codebook
) -> bytes:
    """Sets of ids, filled up with `nothing`, and a number below 2^13 for each id.

    The number of runs, then sections: sizes and their escapes; in a third, orders, raw bits,
    escapes of the riding numbers, runs of these, runs of symbols.
    """
    vocabulary = len(book.rank) - 1
    there = ids != vocabulary
    chosen = book.choose(ids)
    places = book.places(np.where(there, ids, 0), chosen=chosen).astype(np.uint64)
    keys = np.where(there, places << np.uint64(_NUMBER_BITS) | riding.astype(np.uint64), _ABSENT)
    keys.sort(axis=1)
    sizes = there.sum(1)
    by_size = np.argsort(-sizes, kind="stable")
    keys, there = keys[by_size].T, _there(sizes[by_size], width=ids.shape[1])
    places = (keys >> np.uint64(_NUMBER_BITS)).astype(np.int64)
    gaps = np.diff(places, axis=0, prepend=-1)[there] - 1
    if gaps.min(initial=0) < 0:
        raise ValueError("an id is twice in one set")
    symbols, raw = numbers.encode(gaps)
    codes, escapes = small((keys[there] & np.uint64((1 << _NUMBER_BITS) - 1)).astype(np.uint32))
    count = max(1, min(_MOST_RUNS, len(gaps) // _ENTRIES_PER_RUN))
    runs = columns(len(gaps), count)
    size_codes, size_escapes = small(sizes.astype(np.uint32))
    sets = [
        squeeze(chosen[by_size].astype(np.uint8)),
        raw,
        escapes,
        *(squeeze(codes[run]) for run in runs),
        *(squeeze(symbols[run]) for run in runs),
    ]
    return bytes([count]) + join([squeeze(size_codes), size_escapes, join(sets)])


def decode_sets(
    payload: bytes, *, positions: int, book: Codebook, vocabulary: int
) -> tuple[np.ndarray, np.ndarray, Bool[np.ndarray, "n w"]]:
    """Ids and riding numbers [n, w], and where there are any, in the order of their places."""
    count = payload[0] if payload else 0
    if not 1 <= count <= _MOST_RUNS:
        raise ValueError(f"{count} runs; 1 to {_MOST_RUNS} can be")
    size_codes, size_escapes, sets = split(payload[1:], count=3)
    sizes = unsmall(expand(size_codes, size=positions), size_escapes).astype(np.int64)
    entries, width = int(sizes.sum()), int(sizes.max(initial=0))
    runs = columns(entries, count)
    chosen, raw, escapes, *frames = split(sets, count=3 + 2 * len(runs))
    chosen = expand(chosen, size=positions)
    if chosen.max(initial=0) >= book.orders:
        raise ValueError(f"order {chosen.max()}; there are {book.orders}")
    codes, symbols = np.empty((2, entries), np.uint8)
    for run, of_codes, of_symbols in zip(
        runs, frames[: len(runs)], frames[len(runs) :], strict=True
    ):
        codes[run] = expand(of_codes, size=run.stop - run.start)
        symbols[run] = expand(of_symbols, size=run.stop - run.start)
    by_size = np.argsort(-sizes, kind="stable")
    there = _there(sizes[by_size], width=width)
    places = np.zeros(there.shape, np.int32)
    places[there] = numbers.decode(symbols, raw) + 1
    places = np.cumsum(places, axis=0, dtype=np.int32) - 1
    if entries and not 0 <= places[there].min() <= places[there].max() < book.depth + vocabulary:
        raise ValueError("a place outside the vocabulary")
    riding = np.zeros(there.shape, np.int32)
    riding[there] = unsmall(codes, escapes)
    found = book.ids(np.maximum(places, 0), chosen=chosen)
    back = np.argsort(by_size, kind="stable")
    return found.T[back], riding.T[back], there.T[back]


def _sets(targets: Targets, *, vocabulary: int) -> Integer[np.ndarray, "n w"]:
    """Kept and sampled ids side by side, `nothing` where there is none."""
    assert targets.draws, "threshold sampling always draws"
    ids = np.concatenate([targets.ids, targets.draws.ids], axis=1)
    there = np.isfinite(np.concatenate([targets.logprobs, targets.draws.logprobs], axis=1))
    return np.where(there, ids, nothing(vocabulary))


def _there(sizes: Integer[np.ndarray, " n"], *, width: int) -> Bool[np.ndarray, "w n"]:
    return np.arange(width)[:, None] < sizes


def _first(
    keys: Integer[np.ndarray, "n w"], *, where: Bool[np.ndarray, "n w"], count: int
) -> Integer[np.ndarray, "n count"]:
    """The `count` smallest keys of each row, filled up with _ABSENT."""
    if where.sum(1).max(initial=0) > count:
        raise ValueError(f"more than the {count} tokens that a position can have")
    ordered = np.sort(np.where(where, keys, _ABSENT), axis=1)[:, :count]
    missing = ((0, 0), (0, count - ordered.shape[1]))
    return np.pad(ordered, missing, constant_values=_ABSENT)


def _ids(
    keys: Integer[np.ndarray, "n m"], *, there: Bool[np.ndarray, "n m"]
) -> Integer[np.ndarray, "n m"]:
    return np.where(there, keys, 0).astype(np.int32)
