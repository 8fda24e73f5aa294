"""Codec `fast`: top-k in order, ids as ranks by corpus frequency, levels as differences.

It also owns the permutation between ids and ranks, which the other codecs use.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from decant.schemas.codecs.block import Tables
from decant.schemas.codecs.levels import LEVEL_BITS, MINUS_INFINITY
from decant.schemas.codecs.streams import (
    by_position,
    cells,
    compress,
    cumsum_in_place,
    decompress,
    escape,
    fill_columns,
    grid,
    id_planes,
    join,
    split,
    unescape,
)

ID_BITS = 32 - LEVEL_BITS
"""Bits of an id; it shares 32 bits with a level. Vocabularies have up to 2^20 ids."""
_FIRST_RANKS = 4
"""Level differences between the first entries are large and get a stream of their own."""


def fit(ids: Integer[np.ndarray, "n k"], *, vocabulary: int) -> dict[str, np.ndarray]:
    """The table `order`: the sample's ids, most frequent first. All others follow by id."""
    counts = np.bincount(ids.reshape(-1), minlength=vocabulary)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    return {"order": order.astype(np.int32)}


def permutation(
    tables: Tables, *, vocabulary: int, name: str = "order"
) -> tuple[np.ndarray, np.ndarray]:
    """The id of each rank by frequency, and the rank of each id; both int32 [vocabulary].

    The table `name` lists the first ids; all others follow in ascending order.
    """

    def build(tables: Tables) -> tuple[np.ndarray, np.ndarray]:
        absent = np.ones(vocabulary, bool)
        absent[tables[name]] = False
        order = np.concatenate([tables[name], np.flatnonzero(absent)]).astype(np.int32)
        rank = np.empty_like(order)
        rank[order] = np.arange(vocabulary, dtype=np.int32)
        return order, rank

    return tables.compute_once(f"permutation {name} {vocabulary}", build)


def encode(
    ids: Integer[np.ndarray, "n k"],
    levels: Integer[np.ndarray, "n k"],
    *,
    tables: Tables,
    vocabulary: int,
) -> bytes:
    """The payload: escapes, differences of the first levels, of the others, ranks by byte plane."""
    # Equal levels decode to equal log-probabilities; ties are ordered by id.
    keys = np.sort(levels << np.uint32(ID_BITS) | ids.astype(np.uint32), axis=1)
    keys = np.ascontiguousarray(keys.T)
    levels = keys >> np.uint32(ID_BITS)
    differences = levels.copy()
    differences[1:] -= levels[:-1]
    codes, escapes = escape(differences)
    _, rank = permutation(tables, vocabulary=vocabulary)
    ranks = rank.take(keys & np.uint32((1 << ID_BITS) - 1), mode="clip")
    planes = [
        compress((ranks >> 8 * byte).astype(np.uint8)) for byte in range(id_planes(vocabulary))
    ]
    return join([escapes, compress(codes[:_FIRST_RANKS]), compress(codes[_FIRST_RANKS:]), *planes])


def decode(
    payloads: Sequence[bytes],
    *,
    positions: Sequence[int],
    k: int,
    tables: Tables,
    vocabulary: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 and levels uint16, [n, k], records one after another.

    By ascending level, ties by id.
    """
    head, planes = min(k, _FIRST_RANKS), id_planes(vocabulary)
    heights = [head, k - head, *planes * [k]]
    codes, escapes = grid(sum(heights), positions), []
    for cell, payload, n in zip(cells(positions), payloads, positions, strict=True):
        own_escapes, *frames = split(payload, count=3 + planes)
        escapes.append(own_escapes)
        fill_columns(
            codes[:, cell], decompress(frames, sizes=[height * n for height in heights]), [n]
        )
    levels = unescape(codes[:k], escapes, columns=positions).astype(np.uint16)
    if cumsum_in_place(levels).max() > MINUS_INFINITY:
        raise ValueError("a level of log-probability is outside its range")
    ranks = codes[k : 2 * k].astype(np.uint16 if planes < 3 else np.uint32)
    for byte, plane in enumerate(codes[2 * k :].reshape(-1, *ranks.shape), start=1):
        ranks |= plane.astype(ranks.dtype) << 8 * byte
    if ranks.max() >= vocabulary:
        raise ValueError(f"rank {ranks.max()} in a vocabulary of {vocabulary}")
    order, _ = permutation(tables, vocabulary=vocabulary)
    ids = order.take(by_position(ranks, positions), mode="clip")
    return ids, by_position(levels, positions)
