"""Codec of counts: distinct ids with counts, between one and N a position; ids and counts exact.

Ids of the stored head have their counts coded by `head_counts.py`, the others are a set
(`id_sets.py`). The count of an id in a set is nearly always 1: a flag says where not. A position
without a head stores no count for the first id of its set: it is what remains of N.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64, Integer

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
    counts = _decode_counts(coded, entries, has_head)
    before = np.concatenate([[0], np.cumsum(counts)])
    rest = draws - np.diff(before[np.cumsum(entries.sizes)], prepend=0)
    of_head = np.zeros((len(head), 0), np.int64)
    if head.k:
        sections = [own[_COUNT_SECTIONS:] for own in coded]
        of_head = head_counts.decode(sections, head.logprobs, positions=positions, draws=draws)
        rest -= of_head.sum(1)
        of_head[has_head, 0] = rest[has_head]
    # Without a head, what remains of N is the count of the first id of the set.
    first = np.cumsum(entries.sizes) - entries.sizes
    alone = ~has_head
    if (entries.sizes[alone] == 0).any() or rest.min() < 0 or (rest[alone] == 0).any():
        raise ValueError(f"counts of a position do not sum to {draws}")
    counts[first[alone]] = rest[alone]
    widest = int(entries.sizes.max(initial=0))
    keys = np.full((len(head), widest + head.k), _NONE)
    slots = np.repeat((widest + head.k) * np.arange(len(head)) - first, entries.sizes)
    slots += np.arange(len(ids))
    keys.reshape(-1)[slots] = _keys(ids, counts)
    keys[:, widest:] = np.where(of_head > 0, _keys(head.ids, of_head), _NONE)
    return _by_id(keys, held=entries.sizes + np.count_nonzero(of_head, axis=1), draws=draws)


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


def _decode_counts(
    coded: Sequence[Sequence[bytes]],
    entries: Entries,
    has_head: Bool[np.ndarray, " n"],
) -> Int64[np.ndarray, " all"]:
    """The counts of ids in sets, in order of their places; 0 where none is stored."""
    stored = _stored(entries, has_head)
    flags, symbols, raw = zip(*(own[:_COUNT_SECTIONS] for own in coded), strict=True)
    sizes = count_flags(stored, entries.of_record)
    several = decode_flags(flags, counts=sizes)
    values = np.ones(len(several), np.int64)
    more = decode_numbers(symbols, raw, counts=count_flags(several, sizes))
    values[several] += 1 + more
    counts = np.zeros(len(stored), np.int64)
    counts[entries.order[stored]] = values
    return counts


def _keys(ids: Integer[np.ndarray, "..."], counts: Int64[np.ndarray, "..."]) -> np.ndarray:
    """An id above its count, less one: uint32. Sorting keys sorts ids; count 0 of id 0 is last."""
    keys = ids.astype(np.uint32)
    keys <<= np.uint32(_COUNT_BITS)
    keys += counts.astype(np.uint32)
    keys -= np.uint32(1)
    return keys


def _by_id(keys: np.ndarray, *, held: Int64[np.ndarray, " n"], draws: int) -> Counts:
    """The counts in keys [n, w] of positions with `held` ids, ids ascending.

    ValueError for an id that a position has twice.
    """
    width = int(held.max())
    keys.sort(axis=1)
    keys = np.ascontiguousarray(keys[:, :width])
    ids = keys >> np.uint32(_COUNT_BITS)
    # Neighbours that are both empty are alike too.
    if np.count_nonzero(ids[:, 1:] == ids[:, :-1]) > np.maximum(width - held - 1, 0).sum():
        raise ValueError("an id occurs twice in one position's counts")
    keys += np.uint32(1)  # an empty slot becomes 0
    np.right_shift(keys, np.uint32(_COUNT_BITS), out=ids)
    keys &= np.uint32((1 << _COUNT_BITS) - 1)
    return Counts(ids.view(np.int32), keys.view(np.int32), draws)


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
