"""How targets are stored small: one block per field, each with the id of its codec.

`lossless` keeps every bit. `fast` and `compact` store log-probabilities as levels and the tail
as multiples of 1/32 nat; what they decode to is a distribution (head and tail sum to one)
within about 1e-4 nats of KL from the original.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from schemas.codecs import compact, fast, lossless, tail
from schemas.codecs.block import TAIL, TOPK, Block, Tables
from schemas.codecs.levels import STEPS, quantiser, quantiser_of
from schemas.codecs.normalise import normalised
from schemas.targets import Targets

__all__ = ["PROFILES", "TAIL", "TOPK", "Block", "Profile", "Tables", "decode", "encode", "fit"]

Profile = Literal["lossless", "fast", "compact"]
PROFILES: tuple[Profile, ...] = ("lossless", "fast", "compact")

# Codec ids of the top-k field. The tail's are in tail.py. An id means what it meant in the
# first release that wrote it, forever: an improvement is a new id.
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
    if profile == "compact":
        arrays |= compact.fit(sample.ids, order=arrays["order"], vocabulary=vocabulary)
    return Tables(arrays)


def encode(profile: Profile, targets: Targets, *, tables: Tables, vocabulary: int) -> list[Block]:
    """The blocks of one record; none for a record without positions."""
    _check(targets, vocabulary=vocabulary)
    if not len(targets):
        return []
    ids, logprobs, values = targets.ids, targets.logprobs, targets.tail_logmass
    if profile == "lossless":
        return [
            Block(TOPK, LOSSLESS, lossless.encode(ids, logprobs, vocabulary=vocabulary)),
            Block(TAIL, tail.EXACT, tail.encode_exact(values)),
        ]
    levels = quantiser_of(tables).levels(logprobs)
    rest = tail.encode_quantised(
        values, last=levels.max(1), tables=tables, vocabulary=vocabulary, k=targets.k
    )
    codec = _CODEC_OF[profile]
    topk = _QUANTISED[codec].encode(ids, levels, tables=tables, vocabulary=vocabulary)
    return [Block(TOPK, codec, topk), Block(TAIL, tail.QUANTISED, rest)]


def decode(
    blocks: Sequence[Block], *, positions: int, k: int, vocabulary: int, tables: Tables
) -> Targets:
    """What `encode` was given, by the codec ids in the blocks.

    ValueError for a payload that is truncated, altered or of another shape, where the payload
    alone shows it; the record's checksum sees the rest.
    """
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k = {k} of a vocabulary of {vocabulary}")
    if not positions:
        return Targets(
            ids=np.zeros((0, k), np.int32),
            logprobs=np.zeros((0, k), np.float32),
            tail_logmass=np.zeros((0, 7), np.float32),
        )
    by_field = {block.field: block for block in blocks}
    if not {TOPK, TAIL} <= set(by_field):
        raise ValueError(f"a record holds fields {sorted(by_field)}; {TOPK} and {TAIL} are needed")
    topk, rest = by_field[TOPK], by_field[TAIL]
    shape = {"positions": positions, "k": k, "vocabulary": vocabulary}
    if (topk.codec, rest.codec) == (LOSSLESS, tail.EXACT):
        ids, logprobs = lossless.decode(topk.payload, **shape)
        values = tail.decode_exact(rest.payload, **shape)
        return Targets(ids=ids, logprobs=logprobs, tail_logmass=values)
    if topk.codec not in _QUANTISED or rest.codec != tail.QUANTISED:
        raise ValueError(
            f"codecs {topk.codec} (top-k) and {rest.codec} (tail) are not known to this version, "
            f"or not together: a newer version wrote them"
        )
    ids, levels = _QUANTISED[topk.codec].decode(topk.payload, tables=tables, **shape)
    values = tail.decode_quantised(
        rest.payload, last=levels[:, -1], tables=tables, vocabulary=vocabulary, k=k
    )
    logprobs = quantiser_of(tables).logprob.take(levels, mode="clip")
    logprobs, values = normalised(logprobs, values)
    return Targets(ids=ids, logprobs=logprobs, tail_logmass=values)


def _check(targets: Targets, *, vocabulary: int) -> None:
    n, k = targets.ids.shape
    if targets.logprobs.shape != (n, k) or targets.tail_logmass.shape != (n, 7):
        raise ValueError(
            f"targets of shapes {targets.ids.shape}, {targets.logprobs.shape}, "
            f"{targets.tail_logmass.shape}; expected [n, k], [n, k], [n, 7]"
        )
    if not 1 <= k <= vocabulary <= 1 << fast.ID_BITS:
        raise ValueError(f"k = {k}, vocabulary = {vocabulary}: need 1 ≤ k ≤ vocabulary ≤ 2^20")
    if n and (targets.ids.min() < 0 or targets.ids.max() >= vocabulary):
        raise ValueError(f"an id outside the vocabulary of {vocabulary}")
