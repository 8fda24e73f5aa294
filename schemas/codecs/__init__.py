"""Codecs encode targets as one block per field; each block carries its codec's id.

Profile `lossless` keeps every bit. Profiles `fast` and `compact` store log-probabilities as levels
and the tail as multiples of 1/32 nat. They decode to a distribution (head and tail sum to one)
within about 1e-4 nats of KL from the original.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from decant.schemas.codecs import compact, draws_field, fast, labels_field, lossless, tail_field
from decant.schemas.codecs.block import DRAWS, LABELS, TAIL, TOPK, Block, Tables
from decant.schemas.codecs.distributions import require_bounds, require_total, total_mass
from decant.schemas.codecs.levels import STEPS, quantiser, quantiser_of
from decant.schemas.codecs.normalise import normalise
from decant.schemas.targets.draws import Draws
from decant.schemas.targets.sizes import shortened, sizes_for
from decant.schemas.targets.targets import BETAS, EIGHTHS, Targets

__all__ = [
    "DRAWS",
    "LABELS",
    "NODES",
    "PROFILES",
    "TAIL",
    "TOPK",
    "Block",
    "Profile",
    "Tables",
    "count_draws",
    "decode",
    "encode",
    "fit",
    "group_key",
]

Profile = Literal["lossless", "fast", "compact"]
PROFILES: tuple[Profile, ...] = ("lossless", "fast", "compact")
NODES: dict[Profile, tuple[float, ...]] = {"lossless": EIGHTHS, "fast": BETAS, "compact": BETAS}
"""The nodes at which each profile stores the tail's mass."""

# Codec ids of the top-k field; those of the tail and of draws are in tail_field.py and
# draws_field.py. The meaning of an id never changes after its first release: a better codec gets a
# new id.
LOSSLESS = 1
FAST = 2
COMPACT = 3
_CODEC_OF = {"fast": FAST, "compact": COMPACT}
_QUANTISED = {FAST: fast, COMPACT: compact}


def fit(profile: Profile, sample: Targets, *, vocabulary: int, mass: float | None = None) -> Tables:
    """The tables of a profile, computed from the calibration sample. Deterministic.

    The sample has k ids at every position, also if with `mass` only as many will be stored.
    """
    if profile == "lossless" or not sample.k:
        return Tables({})
    levels = quantiser(*STEPS).levels(sample.logprobs)
    arrays = {"steps": np.array(STEPS)}
    sizes = np.full(len(sample), sample.k)
    if mass is not None:
        sizes = sizes_for(sample.logprobs, mass=mass)
    arrays |= tail_field.fit(
        shortened(sample, sizes).tail_logmass if mass is not None else sample.tail_logmass,
        last=np.take_along_axis(levels, sizes[:, None] - 1, 1)[:, 0],
        sizes=sizes,
        vocabulary=vocabulary,
    )
    arrays |= fast.fit(sample.ids, vocabulary=vocabulary)
    if sample.draws:
        arrays |= draws_field.fit(sample.draws, order=arrays["order"], vocabulary=vocabulary)
    if profile == "compact":
        arrays |= compact.fit(sample.ids, order=arrays["order"], vocabulary=vocabulary)
    return Tables(arrays)


def encode(profile: Profile, targets: Targets, *, tables: Tables, vocabulary: int) -> list[Block]:
    """The blocks of one record; an empty list for a record without positions.

    Targets with k = 0 have no top-k, tail and draws. ValueError for wrong shapes or ids outside the
    vocabulary, and for NaN unless `lossless`.
    """
    _check(targets, profile=profile, vocabulary=vocabulary)
    if not len(targets):
        return []
    blocks = _encode_head(profile, targets, tables=tables, vocabulary=vocabulary)
    if targets.label_logprobs is not None:
        blocks.append(labels_field.encode(targets.label_logprobs, exact=profile == "lossless"))
    return blocks


def _encode_head(
    profile: Profile, targets: Targets, *, tables: Tables, vocabulary: int
) -> list[Block]:
    """The blocks of the top-k, the tail and the draws; none for k = 0."""
    if not targets.k:
        return []
    shared = {"tables": tables, "vocabulary": vocabulary}
    ids, logprobs, values = targets.ids, targets.logprobs, targets.tail_logmass
    if profile == "lossless":
        blocks = [
            Block(TOPK, LOSSLESS, lossless.encode(ids, logprobs, vocabulary=vocabulary)),
            Block(TAIL, tail_field.exact_codec(values), tail_field.encode_exact(values)),
        ]
        if targets.draws:
            payload = draws_field.encode_exact(targets.draws, vocabulary=vocabulary)
            blocks.append(Block(DRAWS, draws_field.EXACT, payload))
        return blocks
    quantiser = quantiser_of(tables)
    levels = quantiser.levels(logprobs)
    last = levels.max(1)
    codec = _CODEC_OF[profile]
    blocks = [
        Block(TOPK, codec, _QUANTISED[codec].encode(ids, levels, **shared)),
        Block(
            TAIL,
            tail_field.QUANTISED,
            tail_field.encode_quantised(values, last=last, k=targets.k, **shared),
        ),
    ]
    if targets.draws:
        payload = draws_field.encode_quantised(
            targets.draws, last=quantiser.logprob[last], **shared
        )
        blocks.append(Block(DRAWS, draws_field.QUANTISED, payload))
    return blocks


def group_key(blocks: Sequence[Block]) -> tuple[tuple[int, int, bytes], ...]:
    """A key that records must share to be decoded together: fields, codecs, and kind of draws."""
    return tuple(
        (
            block.field,
            block.codec,
            draws_field.header_of(block.payload) if block.field == DRAWS else b"",
        )
        for block in blocks
    )


def count_draws(blocks: Sequence[Block]) -> int:
    """Draws per position of a record with these blocks."""
    return max((draws_field.count(b.payload) for b in blocks if b.field == DRAWS), default=0)


def decode(
    records: Sequence[Sequence[Block]],
    *,
    positions: Sequence[int],
    k: int,
    vocabulary: int,
    tables: Tables,
    normalised: bool = True,
) -> Targets:
    """The targets of all records, one after another, decoded by the codec ids in their blocks.

    Record i has `positions[i]` ≥ 1 positions; all records share one `group_key`. Without
    `normalised` a quantised head and its tail do not sum to one exactly: they are the values of
    the stored levels, which `encode` stores again. ValueError for a payload that is truncated,
    altered or of another shape, if the payload itself shows it, and for targets that are no
    distributions. The record's checksum finds all other damage.
    """
    if not 0 <= k <= vocabulary:
        raise ValueError(f"k = {k} of a vocabulary of {vocabulary}")
    if not sum(positions):
        return _without_entries(0, k=k)
    fields = {block.field for block in records[0]}
    least, most = ({TOPK, TAIL}, {TOPK, TAIL, DRAWS, LABELS}) if k else (set(), {LABELS})
    if not least <= fields <= most:
        raise ValueError(
            f"a record with k = {k} holds fields {sorted(fields)}; expected {sorted(least)}, and "
            f"at most {sorted(most)}"
        )
    if not k:
        targets = _without_entries(sum(positions), k=0)
    else:
        targets = _decode_head(
            [[block for block in blocks if block.field != LABELS] for blocks in records],
            positions=positions,
            k=k,
            vocabulary=vocabulary,
            tables=tables,
            normalised=normalised,
        )
    if LABELS not in fields:
        return targets
    blocks = [block for blocks in records for block in blocks if block.field == LABELS]
    labels = labels_field.decode(blocks, positions=positions)
    return dataclasses.replace(targets, label_logprobs=labels)


def _without_entries(n: int, *, k: int) -> Targets:
    """Targets of n positions, for n = 0 or k = 0."""
    return Targets(
        ids=np.zeros((n, k), np.int32),
        logprobs=np.zeros((n, k), np.float32),
        tail_logmass=np.zeros((n, len(BETAS) if k else 0), np.float32),
    )


def _decode_head(
    records: Sequence[Sequence[Block]],
    *,
    positions: Sequence[int],
    k: int,
    vocabulary: int,
    tables: Tables,
    normalised: bool,
) -> Targets:
    """`decode` of the blocks of the top-k, the tail and the draws."""
    codec_of = {block.field: block.codec for block in records[0]}
    payloads = {
        field: [block.payload for blocks in records for block in blocks if block.field == field]
        for field in codec_of
    }
    shape = {"positions": positions, "vocabulary": vocabulary}
    exact = {
        TOPK: {LOSSLESS},
        TAIL: {tail_field.EXACT, tail_field.EXACT_EIGHTHS},
        DRAWS: {draws_field.EXACT},
    }
    if all(codec in exact[field] for field, codec in codec_of.items()):
        ids, logprobs = lossless.decode(payloads[TOPK], k=k, **shape)
        values = tail_field.decode_exact(payloads[TAIL], codec=codec_of[TAIL], k=k, **shape)
        draws = draws_field.decode_exact(payloads[DRAWS], **shape) if DRAWS in payloads else None
        require_total(total_mass(logprobs, values))
        return require_bounds(Targets(ids, logprobs, values, draws))
    topk = codec_of[TOPK]
    quantised = {TOPK: topk, TAIL: tail_field.QUANTISED, DRAWS: draws_field.QUANTISED}
    if topk not in _QUANTISED or not codec_of.items() <= quantised.items():
        raise ValueError(
            f"codecs {codec_of} (by field) are unknown to this release, alone or together: a newer "
            f"version wrote them"
        )
    shape["tables"] = tables
    ids, levels = _QUANTISED[topk].decode(payloads[TOPK], k=k, **shape)
    last = levels[:, -1]
    values = tail_field.decode_quantised(payloads[TAIL], last=last, k=k, **shape)
    logprob = quantiser_of(tables).logprob
    of_levels = logprob.take(levels, mode="clip"), values
    logprobs, values, shift = normalise(*of_levels)
    if not normalised:
        (logprobs, values), shift = of_levels, np.zeros_like(shift)
    if DRAWS not in payloads:
        return require_bounds(Targets(ids, logprobs, values))
    last_logprob = logprob.take(last, mode="clip")
    draws = draws_field.decode_quantised(payloads[DRAWS], last=last_logprob, **shape)
    shifted = (draws.logprobs.T - shift.T).T  # stays [m, n] in memory
    return require_bounds(Targets(ids, logprobs, values, Draws(draws.ids, shifted, draws.betas)))


def _check(targets: Targets, *, profile: Profile, vocabulary: int) -> None:
    n, k = targets.ids.shape
    tails = [(n, len(nodes)) for nodes in ({BETAS, NODES[profile]} if k else {()})]
    if targets.logprobs.shape != (n, k) or targets.tail_logmass.shape not in tails:
        raise ValueError(
            f"targets of shapes {targets.ids.shape}, {targets.logprobs.shape}, "
            f"{targets.tail_logmass.shape}; expected [n, k], [n, k] and one of {tails}"
        )
    if not 0 <= k <= vocabulary <= 1 << fast.ID_BITS:
        raise ValueError(f"k = {k}, vocabulary = {vocabulary}: need 0 ≤ k ≤ vocabulary ≤ 2^20")
    if targets.label_logprobs is not None and targets.label_logprobs.shape != (n,):
        raise ValueError(
            f"label log-probabilities of shape {targets.label_logprobs.shape}; expected [{n}]"
        )
    if targets.ids.size and (targets.ids.min() < 0 or targets.ids.max() >= vocabulary):
        raise ValueError(f"an id outside the vocabulary of {vocabulary}")
