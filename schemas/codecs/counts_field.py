"""Codec of counts: distinct ids with counts, between one and N a position; ids and counts exact.

Ids of the stored head have their counts coded by `head_counts.py`, the others are a set
(`id_sets.py`). The count of an id in a set is nearly always 1: a flag says where not. A position
without a head stores no count for the first id of its set: it is what remains of N.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer, UInt32

from decant.schemas.codecs import head_counts, id_sets
from decant.schemas.codecs.block import COUNTS, Block, Tables
from decant.schemas.codecs.fast import ID_BITS
from decant.schemas.codecs.flags import (
    count_flags,
    decode_flags,
    decode_numbers,
    encode_flags,
    encode_numbers,
)
from decant.schemas.codecs.id_sets import Entries
from decant.schemas.codecs.streams import join, split
from decant.schemas.targets.counts import MOST_DRAWS, Counts
from decant.schemas.targets.targets import Targets

JOINT = 1
_COUNT_SECTIONS = 3
_COUNT_BITS = 11
_NONE = np.uint32(0xFFFFFFFF)
_KEYS_AT_ONCE = 1 << 16
"""Keys that are sorted at once stay in the processor's cache."""


def fit(counts: Counts, *, head: Targets, vocabulary: int) -> Tables:
    """The codec's tables, from the calibration sample. `head` is as in `encode`. Deterministic."""
    _, sets = _apart(counts, head=head, vocabulary=vocabulary)
    return Tables(id_sets.fit(sets, vocabulary=vocabulary))


def encode(counts: Counts, *, head: Targets, tables: Tables, vocabulary: int) -> Block:
    """The block of one record with at least one position.

    `head` is what the logits record of the same positions decodes to; a log-probability of −inf
    marks an empty slot. ValueError for counts that are not as `Counts` says, and for an id outside
    the vocabulary.
    """
    _check(counts, head=head, vocabulary=vocabulary)
    of_head, sets = _apart(counts, head=head, vocabulary=vocabulary)
    sections, slots, entries = id_sets.encode(sets, tables=tables, vocabulary=vocabulary)
    stored = _stored(entries, _has_head(head))
    of_set = counts.counts.reshape(-1)[slots][entries.order][stored] - 1
    coded = [encode_flags(of_set > 0), *encode_numbers(of_set[of_set > 0] - 1)]
    if head.k:
        coded += head_counts.encode(of_head, head.logprobs, draws=counts.draws)
    frames = len(sections) - id_sets.SECTIONS
    return Block(COUNTS, JOINT, bytes([frames]) + join([*coded, *sections]))


def decode(
    blocks: Sequence[Block],
    *,
    positions: Sequence[int],
    draws: int,
    head: Targets,
    tables: Tables,
    vocabulary: int,
) -> Counts:
    """The counts that `encode` was given, records one after another; each with ≥ 1 position.

    `draws` is N; `head` holds the targets of all positions. ValueError for a damaged payload, if
    the payload itself shows it.
    """
    coded, of_sets = zip(*(_sections(block, k=head.k) for block in blocks), strict=True)
    ids, entries = id_sets.decode(
        of_sets, positions=positions, tables=tables, vocabulary=vocabulary
    )
    has_head = _has_head(head)
    at, more = _decode_several(coded, entries, has_head)
    if more.max(initial=0) >= draws:
        raise ValueError(f"a count above {draws}")
    # Almost all counts in sets are 1.
    position = np.repeat(np.arange(len(head), dtype=np.int32), entries.sizes)[at]
    added = np.bincount(position, weights=more, minlength=len(head)).astype(np.int64)
    rest = draws - entries.sizes - added
    of_head = np.zeros((len(head), 0), np.int32)
    if head.k:
        sections = [own[_COUNT_SECTIONS:] for own in coded]
        of_head = head_counts.decode(sections, head.logprobs, positions=positions, draws=draws)
        rest -= _sums(of_head)
    # Without a head, what remains of N is added to the one of the set's first id.
    alone = np.flatnonzero(~has_head)
    if (entries.sizes[alone] == 0).any() or rest.min() < 0:
        raise ValueError(f"counts of a position do not sum to {draws}")
    if head.k:
        of_head[:, 0] = np.where(has_head, rest, 0)
    of_sets = ids.astype(np.uint32)
    of_sets <<= np.uint32(_COUNT_BITS)
    of_sets[at] += more.astype(np.uint32)
    of_sets[entries.starts[alone]] += rest[alone].astype(np.uint32)
    in_head = head.ids.astype(np.uint32)
    in_head <<= np.uint32(_COUNT_BITS)
    in_head += of_head.view(np.uint32)
    in_head -= np.uint32(1)
    drawn = of_head > 0
    in_head[~drawn] = _NONE
    held = entries.sizes + _sums(drawn.astype(np.int32))
    return _by_id(of_sets, in_head, entries=entries, held=held, draws=draws)


def _sections(block: Block, *, k: int) -> tuple[list[bytes], list[bytes]]:
    """The sections of counts and of sets of one payload."""
    if block.codec != JOINT:
        raise ValueError(f"codec {block.codec} of counts is unknown to this release")
    frames = block.payload[0] if block.payload else 0
    if not 1 <= frames <= id_sets.MOST_FRAMES:
        raise ValueError(f"{frames} frames of ids; expected 1 to {id_sets.MOST_FRAMES}")
    first = _COUNT_SECTIONS + (head_counts.SECTIONS if k else 0)
    sections = split(block.payload, start=1, count=first + id_sets.SECTIONS + frames)
    return sections[:first], sections[first:]


def _has_head(head: Targets) -> Bool[np.ndarray, " n"]:
    """The positions whose head holds an id; the count of its first one is not stored."""
    return head.logprobs[:, 0] > -np.inf if head.k else np.zeros(len(head), bool)


def _stored(entries: Entries, has_head: Bool[np.ndarray, " n"]) -> Bool[np.ndarray, " all"]:
    """The ids of sets whose counts are stored, in the order of streams."""
    if has_head.all():
        return np.ones(len(entries.first), bool)
    stored = ~entries.first
    if has_head.any():
        stored |= np.repeat(has_head, entries.sizes)
    return stored.take(entries.order)


def _apart(
    counts: Counts, *, head: Targets, vocabulary: int
) -> tuple[Int64[np.ndarray, "n k"], Integer[np.ndarray, "n m"]]:
    """The counts of the head's ids, and the other ids; `vocabulary` in empty slots of these."""
    held = counts.counts > 0
    sets = np.where(held, counts.ids, vocabulary)
    of_head = np.zeros(head.ids.shape, np.int64)
    in_head = head.logprobs > -np.inf
    if in_head.any():
        first = np.arange(len(head))[:, None] * (vocabulary + 1)
        keys, order = np.unique((first + head.ids)[in_head], return_index=True)
        of_id = first + sets
        at = np.minimum(np.searchsorted(keys, of_id), len(keys) - 1)
        found = keys[at] == of_id
        of_head.reshape(-1)[np.flatnonzero(in_head)[order[at[found]]]] = counts.counts[found]
        sets = np.where(found, vocabulary, sets)
    return of_head, sets.astype(np.int32)


def _decode_several(
    coded: Sequence[Sequence[bytes]],
    entries: Entries,
    has_head: Bool[np.ndarray, " n"],
) -> tuple[Int64[np.ndarray, " several"], Int64[np.ndarray, " several"]]:
    """The ids of sets whose stored count is above 1, by their number, and by how much it is."""
    flags, symbols, raw = zip(*(own[:_COUNT_SECTIONS] for own in coded), strict=True)
    order, sizes = entries.order, entries.of_record
    if not has_head.all():
        stored = _stored(entries, has_head)
        order, sizes = order[stored], count_flags(stored, sizes)
    several = decode_flags(flags, counts=sizes)
    more = decode_numbers(symbols, raw, counts=count_flags(several, sizes))
    more += 1
    return order[several], more


def _sums(values: Int32[np.ndarray, "n k"]) -> Int32[np.ndarray, " n"]:
    return np.einsum("nk->n", values)  # a quarter of the time of .sum(1) for rows of this length


def _by_id(
    of_sets: UInt32[np.ndarray, " all"],
    in_head: UInt32[np.ndarray, "n k"],
    *,
    entries: Entries,
    held: Integer[np.ndarray, " n"],
    draws: int,
) -> Counts:
    """The counts of positions with `held` ids, ids ascending, from keys of their sets and heads.

    A key is an id above its count, less one, so that sorting keys sorts ids; empty slots come last.
    ValueError for an id that a position has twice.
    """
    (n, k), sizes = in_head.shape, entries.sizes
    widest, width = int(sizes.max(initial=0)), int(held.max())
    at_once = max(1, _KEYS_AT_ONCE // (widest + k))
    slots = np.repeat((widest + k) * (np.arange(n) % at_once) - entries.starts, sizes)
    slots += np.arange(len(of_sets))
    ids, counts = np.empty((2, n, width), np.uint32)
    room, alike = np.empty((at_once, widest + k), np.uint32), 0
    for first in range(0, n, at_once):
        some = slice(first, first + at_once)
        keys = room[: len(held[some])]
        keys.fill(_NONE)
        end = int(entries.starts[some][-1] + sizes[some][-1])
        of_some = slice(int(entries.starts[first]), end)
        keys.reshape(-1)[slots[of_some]] = of_sets[of_some]
        keys[:, widest:] = in_head[some]
        keys.sort(axis=1)
        keys += np.uint32(1)  # an empty slot becomes 0
        own = np.right_shift(keys[:, :width], np.uint32(_COUNT_BITS), out=ids[some])
        # All neighbours in memory, then without the last of a row and the first of the next.
        in_order = own.reshape(-1)
        alike += np.count_nonzero(in_order[1:] == in_order[:-1])
        alike -= np.count_nonzero(own[1:, 0] == own[:-1, -1])
        np.bitwise_and(keys[:, :width], np.uint32((1 << _COUNT_BITS) - 1), out=counts[some])
    # Neighbours that are both empty are alike too, and so are id 0 and an empty slot after it.
    empty = np.maximum(width - held - 1, 0).sum()
    empty += np.count_nonzero((held == 1) & (ids[:, 0] == 0)) * (width > 1)
    if alike > empty:
        raise ValueError("an id occurs twice in one position's counts")
    return Counts(ids.view(np.int32), counts.view(np.int32), draws)


def _check(counts: Counts, *, head: Targets, vocabulary: int) -> None:
    shape = counts.ids.shape
    if counts.counts.shape != shape or len(head) != len(counts):
        raise ValueError(
            f"counts of shapes {shape} and {counts.counts.shape} with {len(head)} heads"
        )
    if not 1 <= counts.draws <= MOST_DRAWS or not 1 <= vocabulary <= 1 << ID_BITS:
        raise ValueError(f"N = {counts.draws}, vocabulary = {vocabulary}")
    held = counts.counts > 0
    ids = counts.ids[held]
    if len(ids) and (ids.min() < 0 or ids.max() >= vocabulary):
        raise ValueError(f"an id outside the vocabulary of {vocabulary}")
    if (counts.counts < 0).any() or (held[:, 1:] > held[:, :-1]).any():
        raise ValueError("a count below 0, or an empty slot before a full one")
    if (off := counts.counts.sum(1, dtype=np.int64) != counts.draws).any():
        raise ValueError(f"counts of {off.sum()} positions do not sum to {counts.draws}")
    if ((counts.ids[:, 1:] <= counts.ids[:, :-1]) & held[:, 1:]).any():
        raise ValueError("the ids of a position are not distinct and ascending")
