"""How targets are stored small: one block per field, each with the id of its codec.

`lossless` keeps every bit. `fast` and `compact` store log-probabilities as levels and the tail
as multiples of 1/32 nat; what they decode to is a distribution (head and tail sum to one)
within about 1e-4 nats of KL from the original.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from decant.schemas.codecs import compact, fast, lossless
from decant.schemas.codecs import draws_field as draws
from decant.schemas.codecs import tail_field as tail
from decant.schemas.codecs.block import DRAWS, TAIL, TOPK, Block, Tables
from decant.schemas.codecs.levels import STEPS, quantiser, quantiser_of
from decant.schemas.codecs.normalise import normalise
from decant.schemas.targets.draws import Draws
from decant.schemas.targets.targets import BETAS, EIGHTHS, Targets

__all__ = [
    "DRAWS",
    "NODES",
    "PROFILES",
    "TAIL",
    "TOPK",
    "Block",
    "Profile",
    "Tables",
    "decode",
    "encode",
    "fit",
    "group_key",
]

Profile = Literal["lossless", "fast", "compact"]
PROFILES: tuple[Profile, ...] = ("lossless", "fast", "compact")
NODES: dict[Profile, tuple[float, ...]] = {"lossless": EIGHTHS, "fast": BETAS, "compact": BETAS}
"""Where each profile keeps the tail's mass."""

# Codec ids of the top-k field. Those of the tail and of draws are in tail.py and draws.py. An id
# means what it meant in the first release that wrote it, forever: an improvement is a new id.
LOSSLESS = 1
FAST = 2
COMPACT = 3
_CODEC_OF = {"fast": FAST, "compact": COMPACT}
_QUANTISED = {FAST: fast, COMPACT: compact}


def fit(profile: Profile, sample: Targets, *, vocabulary: int) -> Tables:
    """The tables of a profile, from the calibration sample; the same sample, the same tables."""
    if profile == "lossless":
        return Tables({})
    levels = quantiser(*STEPS).levels(sample.logprobs)
    shape = {"vocabulary": vocabulary, "k": sample.k}
    arrays = {"steps": np.array(STEPS)}
    arrays |= tail.fit(sample.tail_logmass, last=levels.max(1), **shape)
    arrays |= fast.fit(sample.ids, vocabulary=vocabulary)
    if sample.draws:
        arrays |= draws.fit(sample.draws, order=arrays["order"], vocabulary=vocabulary)
    if profile == "compact":
        arrays |= compact.fit(sample.ids, order=arrays["order"], vocabulary=vocabulary)
    return Tables(arrays)


def encode(profile: Profile, targets: Targets, *, tables: Tables, vocabulary: int) -> list[Block]:
    """The blocks of one record; none for a record without positions."""
    _check(targets, profile=profile, vocabulary=vocabulary)
    if not len(targets):
        return []
    shared = {"tables": tables, "vocabulary": vocabulary}
    ids, logprobs, values = targets.ids, targets.logprobs, targets.tail_logmass
    if profile == "lossless":
        blocks = [
            Block(TOPK, LOSSLESS, lossless.encode(ids, logprobs, vocabulary=vocabulary)),
            Block(TAIL, tail.exact_codec(values), tail.encode_exact(values)),
        ]
        if targets.draws:
            payload = draws.encode_exact(targets.draws, vocabulary=vocabulary)
            blocks.append(Block(DRAWS, draws.EXACT, payload))
        return blocks
    quantiser = quantiser_of(tables)
    levels = quantiser.levels(logprobs)
    last = levels.max(1)
    codec = _CODEC_OF[profile]
    blocks = [
        Block(TOPK, codec, _QUANTISED[codec].encode(ids, levels, **shared)),
        Block(
            TAIL, tail.QUANTISED, tail.encode_quantised(values, last=last, k=targets.k, **shared)
        ),
    ]
    if targets.draws:
        payload = draws.encode_quantised(targets.draws, last=quantiser.logprob[last], **shared)
        blocks.append(Block(DRAWS, draws.QUANTISED, payload))
    return blocks


def group_key(blocks: Sequence[Block]) -> tuple[tuple[int, int, bytes], ...]:
    """What the blocks of records that are decoded together share: fields, codecs, kind of draws."""
    return tuple(
        (block.field, block.codec, draws.header_of(block.payload) if block.field == DRAWS else b"")
        for block in blocks
    )


def decode(
    records: Sequence[Sequence[Block]],
    *,
    positions: Sequence[int],
    k: int,
    vocabulary: int,
    tables: Tables,
) -> Targets:
    """What `encode` was given for each record, by the codec ids in its blocks, one after another.

    `positions[i]` of record i, at least one each; all of one `form`. ValueError for a payload that
    is truncated, altered or of another shape, where the payload alone shows it; the record's
    checksum sees the rest.
    """
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k = {k} of a vocabulary of {vocabulary}")
    if not sum(positions):
        return Targets(
            ids=np.zeros((0, k), np.int32),
            logprobs=np.zeros((0, k), np.float32),
            tail_logmass=np.zeros((0, len(BETAS)), np.float32),
        )
    codec_of = {block.field: block.codec for block in records[0]}
    if not {TOPK, TAIL} <= set(codec_of) <= {TOPK, TAIL, DRAWS}:
        raise ValueError(f"a record holds fields {sorted(codec_of)}; {TOPK} and {TAIL} are needed")
    of = {
        field: [block.payload for blocks in records for block in blocks if block.field == field]
        for field in codec_of
    }
    shape = {"positions": positions, "vocabulary": vocabulary}
    exact = {TOPK: {LOSSLESS}, TAIL: {tail.EXACT, tail.EXACT_EIGHTHS}, DRAWS: {draws.EXACT}}
    if all(codec in exact[field] for field, codec in codec_of.items()):
        ids, logprobs = lossless.decode(of[TOPK], k=k, **shape)
        values = tail.decode_exact(of[TAIL], codec=codec_of[TAIL], k=k, **shape)
        found = draws.decode_exact(of[DRAWS], **shape) if DRAWS in of else None
        return Targets(ids, logprobs, values, found)
    topk = codec_of[TOPK]
    quantised = {TOPK: topk, TAIL: tail.QUANTISED, DRAWS: draws.QUANTISED}
    if topk not in _QUANTISED or not codec_of.items() <= quantised.items():
        raise ValueError(
            f"codecs {codec_of} (by field) are not known to this version, or not together: a newer "
            f"version wrote them"
        )
    shape["tables"] = tables
    ids, levels = _QUANTISED[topk].decode(of[TOPK], k=k, **shape)
    last = levels[:, -1]
    values = tail.decode_quantised(of[TAIL], last=last, k=k, **shape)
    logprob = quantiser_of(tables).logprob
    logprobs, values, shift = normalise(logprob.take(levels, mode="clip"), values)
    if DRAWS not in of:
        return Targets(ids, logprobs, values)
    last_logprob = logprob.take(last, mode="clip")
    found = draws.decode_quantised(of[DRAWS], last=last_logprob, **shape)
    logprobs_of_draws = (found.logprobs.T - shift.T).T  # [m, n] in memory
    return Targets(ids, logprobs, values, Draws(found.ids, logprobs_of_draws, found.betas))


def _check(targets: Targets, *, profile: Profile, vocabulary: int) -> None:
    n, k = targets.ids.shape
    tails = [(n, len(nodes)) for nodes in {BETAS, NODES[profile]}]
    if targets.logprobs.shape != (n, k) or targets.tail_logmass.shape not in tails:
        raise ValueError(
            f"targets of shapes {targets.ids.shape}, {targets.logprobs.shape}, "
            f"{targets.tail_logmass.shape}; expected [n, k], [n, k] and one of {tails}"
        )
    if not 1 <= k <= vocabulary <= 1 << fast.ID_BITS:
        raise ValueError(f"k = {k}, vocabulary = {vocabulary}: need 1 ≤ k ≤ vocabulary ≤ 2^20")
    if n and (targets.ids.min() < 0 or targets.ids.max() >= vocabulary):
        raise ValueError(f"an id outside the vocabulary of {vocabulary}")
