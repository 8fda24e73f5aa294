"""Counts of ids that the stored head names, given the head's log-probabilities.

Of N equally spaced draws an id of probability p gets ⌊N·p⌋ or ⌈N·p⌉, so only the choice between
neighbours is stored: a flag where the count is not the nearest integer, a second one where it is
not the other neighbour either (the head is quantised), and then the distance. Flags are ordered by
the distance of N·p from an integer. The count of a position's first id is not stored: it is what
remains of N.

Machines differ in the last bits of the exponential and of decoded log-probabilities. N·p is used in
steps of 1/32, and the numbers within `_DOUBT` nats of a step's edge are listed, each with the
parity of its step.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64, Integer

from decant.schemas.codecs.flags import (
    count_flags,
    decode_flags,
    decode_numbers,
    encode_flags,
    encode_numbers,
    stable_order,
)

SECTIONS = 5
_SHIFT = 5
_STEPS = 1 << _SHIFT
"""Steps per draw. The edges of 1024 draws are further apart than `_DOUBT` moves a number."""
_DOUBT = 2e-6
"""Nats. Decoded float32 log-probabilities above −10 differ by less than half of it."""


def encode(
    counts: Integer[np.ndarray, "n k"], logprobs: Float[np.ndarray, "n k"], *, draws: int
) -> list[bytes]:
    """The sections of one record. −inf in `logprobs` marks an empty slot of the head."""
    coded = _coded(logprobs)
    values = logprobs[coded].astype(np.float64)
    step, low, high = (_steps(values + off, draws=draws) for off in (0, -_DOUBT, _DOUBT))
    doubtful = np.flatnonzero(low != high)
    if len(values) >= 1 << 31:
        raise ValueError(f"a record with {len(values)} ids of heads")
    order, nearest, other = _expected(step, [len(step)])
    count = counts[coded].astype(np.int64)[order]
    missed = count != nearest
    beyond = count[missed] != other[missed]
    distance = (count - nearest)[missed][beyond]
    return [
        (doubtful << 1 | step[doubtful] & 1).astype("<u4").tobytes(),
        encode_flags(missed),
        encode_flags(beyond),
        *encode_numbers(distance << 1 ^ distance >> 63),
    ]


def decode(
    sections: Sequence[Sequence[bytes]],
    logprobs: Float[np.ndarray, "total k"],
    *,
    positions: Sequence[int],
    draws: int,
) -> Int64[np.ndarray, "total k"]:
    """The counts of all records; 0 for the first id of each position, which is not stored here.

    `sections[i]` are record i's. ValueError for damaged sections.
    """
    coded = _coded(logprobs)
    doubtful, of_missed, of_beyond, symbols, raw = zip(*sections, strict=True)
    sizes = count_flags(coded.reshape(-1), [n * coded.shape[1] for n in positions])
    step = _settled(logprobs[coded].astype(np.float64), doubtful, sizes, draws=draws)
    order, count, other = _expected(step, sizes)
    flags = decode_flags(of_missed, counts=sizes)
    missed, sizes = np.flatnonzero(flags), count_flags(flags, sizes)
    beyond = decode_flags(of_beyond, counts=sizes)
    sizes = count_flags(beyond, sizes)
    distance = decode_numbers(symbols, raw, counts=sizes)
    distance = distance >> 1 ^ -(distance & 1)
    at = missed[~beyond]
    count[at] = other[at]
    count[missed[beyond]] += distance
    if count.min(initial=0) < 0:
        raise ValueError("a count below 0")
    counts = np.zeros(logprobs.shape, np.int64)
    in_place = np.empty_like(count)
    in_place[order] = count
    counts[coded] = in_place
    return counts


def _coded(logprobs: Float[np.ndarray, "n k"]) -> Bool[np.ndarray, "n k"]:
    """The ids whose counts are stored: all of the head but the first of each position."""
    coded = logprobs > -np.inf
    coded[:, :1] = False
    return coded


def _steps(logprobs: Float[np.ndarray, " m"], *, draws: int) -> Int32[np.ndarray, " m"]:
    """32·N·p, rounded down."""
    return (np.exp(logprobs) * (_STEPS * draws)).astype(np.int32)  # not negative: rounds down


def _settled(
    logprobs: Float[np.ndarray, " m"],
    doubtful: Sequence[bytes],
    sizes: Sequence[int],
    *,
    draws: int,
) -> Int32[np.ndarray, " m"]:
    """The steps that the encoder had; record i has `sizes[i]` of them."""
    step = _steps(logprobs, draws=draws)
    first = 0
    for section, size in zip(doubtful, sizes, strict=True):
        if len(section) % 4:
            raise ValueError(f"a list of {len(section)} bytes of doubtful numbers")
        listed = np.frombuffer(section, "<u4").astype(np.int64)
        if len(listed) and listed.max() >> 1 >= size:
            raise ValueError(f"number {listed.max() >> 1} of {size} is in doubt")
        at = first + (listed >> 1)
        wrong = at[(step[at] ^ listed) & 1 > 0]
        inside = np.exp(logprobs[wrong]) * (_STEPS * draws) - step[wrong]
        step[wrong] += np.where(inside < 0.5, -1, 1)
        first += size
    return np.maximum(step, 0)


def _expected(
    step: Int32[np.ndarray, " m"], sizes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order of flags, record by record, and in it the nearest count and the other neighbour."""
    part = step & _STEPS - 1
    distance = np.minimum(part, _STEPS - 1 - part)
    # Above one draw the error of the head's own log-probabilities blurs the distance.
    kind = distance + (step >= _STEPS) * np.int32(_STEPS // 2)
    order = stable_order(kind, sizes)
    step = step.take(order)
    up = step >> _SHIFT - 1 & 1
    nearest = (step >> _SHIFT) + up
    return order, nearest, nearest + 1 - 2 * up
