"""Rare events among many numbers: one bit each, eight in a byte, so that Huffman codes fit them.

A byte of the entropy stage takes at least one bit. Eight flags in a byte take an eighth of one each
where almost all are 0. Flags should be ordered so that neighbours are equally likely.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from jaxtyping import Bool, Int64, Integer

from decant.schemas.codecs import numbers
from decant.schemas.codecs.streams import (
    compress,
    decompress,
    gather_columns,
    grid_of,
    spans,
)


def encode_flags(flags: Bool[np.ndarray, " n"]) -> bytes:
    """One section: the flags of a record."""
    return compress(np.packbits(flags))


def decode_flags(sections: Sequence[bytes], *, counts: Sequence[int]) -> Bool[np.ndarray, " total"]:
    """The flags of all records, one after another; record i has `counts[i]`."""
    sizes = [(count + 7) // 8 for count in counts]
    flags = np.unpackbits(decompress(sections, sizes=sizes)).view(bool)
    starts = [0, *accumulate(8 * size for size in sizes)]
    return np.concatenate([flags[at : at + n] for at, n in zip(starts, counts, strict=False)])


def stable_order(
    kinds_of: Integer[np.ndarray, " total"], sizes: Sequence[int]
) -> Int64[np.ndarray, " total"]:
    """Entries record by record, in each by kind (at most 255); record i has `sizes[i]`."""
    keys, order = kinds_of.astype(np.uint8), np.empty(len(kinds_of), np.int64)
    for span in spans(sizes):
        # numpy sorts eight bits by one counting pass, and a record stays in the processor's cache.
        np.add(np.argsort(keys[span], kind="stable"), span.start, out=order[span])
    return order


def count_flags(flags: Bool[np.ndarray, " total"], sizes: Sequence[int]) -> list[int]:
    """How many flags of each record are set; record i has `sizes[i]` flags."""
    return [int(np.count_nonzero(flags[span])) for span in spans(sizes)]


def encode_numbers(values: Integer[np.ndarray, " n"]) -> list[bytes]:
    """Two sections: non-negative integers below 2^24 of a record."""
    symbols, raw = numbers.encode(values)
    return [compress(symbols), raw]


def decode_numbers(
    symbols: Sequence[bytes], raw: Sequence[bytes], *, counts: Sequence[int]
) -> Int64[np.ndarray, " total"]:
    """The integers of all records, one after another; record i has `counts[i]`."""
    if not any(counts):
        if any(symbols) or any(raw):
            raise ValueError("bytes for numbers where there are none")
        return np.zeros(0, np.int64)
    stored = grid_of(decompress(symbols, sizes=counts), counts)
    return gather_columns(numbers.decode(stored, raw), counts)[0].astype(np.int64)
