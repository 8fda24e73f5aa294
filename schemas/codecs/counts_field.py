"""Codec of counts: distinct ids with counts, between one and N a position; ids and counts exact."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, Integer

from decant.schemas.codecs.block import COUNTS, Block, Tables
from decant.schemas.codecs.streams import compress, decompress, join, split
from decant.schemas.targets.counts import Counts
from decant.schemas.targets.targets import Targets

PLAIN = 1


def fit(counts: Counts, *, head: Targets, vocabulary: int) -> Tables:
    """The codec's tables, from the calibration sample. `head` is as in `encode`."""
    del counts, head, vocabulary
    return Tables({})


def encode(counts: Counts, *, head: Targets, tables: Tables, vocabulary: int) -> Block:
    """The block of one record with at least one position.

    `head` is what the logits record of the same positions decodes to. ValueError for ids outside
    the vocabulary, ids out of order, or counts that do not sum to N.
    """
    del tables
    _check(counts, head=head, vocabulary=vocabulary)
    held = counts.counts > 0
    sizes = held.sum(1).astype("<u2")
    values = (sizes, counts.ids[held].astype("<u4"), counts.counts[held].astype("<u2"))
    sizes, ids, of_id = (v.view(np.uint8).reshape(-1, v.itemsize) for v in values)
    planes = [sizes, *(np.ascontiguousarray(plane) for plane in (*ids.T, *of_id.T))]
    return Block(COUNTS, PLAIN, join(list(map(compress, planes))))


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
    del head, tables
    if unknown := {block.codec for block in blocks} - {PLAIN}:
        raise ValueError(f"codec {unknown.pop()} of counts is unknown to this release")
    sizes, ids, of_id = [], [], []
    for block, n in zip(blocks, positions, strict=True):
        sections = split(block.payload, count=7)
        own = decompress(sections[:1], sizes=[2 * n]).view("<u2")
        total = int(own.sum(dtype=np.int64))
        planes = decompress(sections[1:], sizes=6 * [total]).reshape(6, total)
        sizes.append(own)
        ids.append(np.ascontiguousarray(planes[:4].T).view("<u4")[:, 0])
        of_id.append(np.ascontiguousarray(planes[4:].T).view("<u2")[:, 0])
    return padded(
        np.concatenate(sizes).astype(np.int64),
        np.concatenate(ids),
        np.concatenate(of_id),
        draws=draws,
        vocabulary=vocabulary,
    )


def padded(
    sizes: Int64[np.ndarray, " n"],
    ids: Integer[np.ndarray, " total"],
    counts: Integer[np.ndarray, " total"],
    *,
    draws: int,
    vocabulary: int,
) -> Counts:
    """Ragged sets as `Counts`. ValueError unless they are counts of `draws` draws."""
    held = np.arange(sizes.max(initial=0)) < sizes[:, None]
    out = Counts(np.zeros(held.shape, np.int32), np.zeros(held.shape, np.int32), draws)
    if len(ids) and ids.max() >= vocabulary:
        raise ValueError(f"id {ids.max()} in a vocabulary of {vocabulary}")
    out.ids[held], out.counts[held] = ids, counts
    if (fault := _fault(out)) is not None:
        raise ValueError(fault)
    return out


def _check(counts: Counts, *, head: Targets, vocabulary: int) -> None:
    if counts.ids.shape != counts.counts.shape or len(head) != len(counts):
        raise ValueError(
            f"counts of shapes {counts.ids.shape} and {counts.counts.shape} with {len(head)} heads"
        )
    if counts.ids.size and (counts.ids.min() < 0 or counts.ids.max() >= vocabulary):
        raise ValueError(f"an id outside the vocabulary of {vocabulary}")
    if (fault := _fault(counts)) is not None:
        raise ValueError(fault)


def _fault(counts: Counts) -> str | None:
    """The rule of `Counts` that these break, or None."""
    held = counts.counts > 0
    if (counts.counts < 0).any() or (held[:, 1:] > held[:, :-1]).any():
        return "a count below 0, or an empty slot before a full one"
    if (off := counts.counts.sum(1, dtype=np.int64) != counts.draws).any():
        return f"counts of {off.sum()} positions do not sum to {counts.draws}"
    if ((counts.ids[:, 1:] <= counts.ids[:, :-1]) & held[:, 1:]).any():
        return "ids of a position are not distinct and ascending"
    return None
