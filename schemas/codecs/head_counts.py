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
from jaxtyping import Float, Int32, Int64, Integer

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
    coded = logprobs > -np.inf
    coded[:, :1] = False
    values = logprobs[coded].astype(np.float64)
    step, low, high = (_steps(values + off, draws=draws) for off in (0, -_DOUBT, _DOUBT))
    doubtful = np.flatnonzero(low != high)
    if len(values) >= 1 << 31:
        raise ValueError(f"a record with {len(values)} ids of heads")
    order, nearest = _order(step, [len(step)]), _nearest(step)
    count = counts[coded].astype(np.int64)
    other = _other(nearest, step)
    count, nearest, other = count[order], nearest[order], other[order]
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
) -> Int32[np.ndarray, "total k"]:
    """The counts of all records; 0 for the first id of each position, which is not stored here.

    `sections[i]` are record i's. ValueError for damaged sections.
    """
    doubtful, of_missed, of_beyond, symbols, raw = zip(*sections, strict=True)
    others = logprobs[:, 1:]
    sizes, coded = [n * others.shape[1] for n in positions], others > -np.inf
    whole = bool(coded.all())
    if not whole:
        sizes = count_flags(coded.reshape(-1), sizes)
    values = (others.reshape(-1) if whole else others[coded]).astype(np.float64)
    step = _settled(values, doubtful, sizes, draws=draws)
    order, count = _order(step, sizes), _nearest(step)
    # In the order of flags. Few are set, so only their numbers are brought into this order.
    missed = decode_flags(of_missed, counts=sizes)
    at = order[missed]
    sizes = count_flags(missed, sizes)
    beyond = decode_flags(of_beyond, counts=sizes)
    distance = decode_numbers(symbols, raw, counts=count_flags(beyond, sizes))
    near = at[~beyond]
    count[near] = _other(count[near], step[near])
    count[at[beyond]] += (distance >> 1 ^ -(distance & 1)).astype(np.int32)
    if count.min(initial=0) < 0 or count.max(initial=0) > draws:
        raise ValueError(f"a count that is not between 0 and {draws}")
    counts = np.zeros(logprobs.shape, np.int32)
    if whole:
        counts[:, 1:] = count.reshape(others.shape)
    else:
        counts[:, 1:][coded] = count
    return counts


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
    lengths = [len(section) for section in doubtful]
    if odd := [length for length in lengths if length % 4]:
        raise ValueError(f"a list of {odd[0]} bytes of doubtful numbers")
    listed = np.frombuffer(b"".join(doubtful), "<u4").astype(np.int64)
    each, size = [length // 4 for length in lengths], np.array(sizes)
    if (beyond := listed >> 1 >= np.repeat(size, each)).any():
        raise ValueError(f"number {listed[beyond][0] >> 1} of a record's numbers is in doubt")
    at = (listed >> 1) + np.repeat(np.cumsum(size) - size, each)
    wrong = at[(step[at] ^ listed) & 1 > 0]
    inside = np.exp(logprobs[wrong]) * (_STEPS * draws) - step[wrong]
    step[wrong] += np.where(inside < 0.5, -1, 1).astype(np.int32)
    return np.maximum(step, 0)


def _order(step: Int32[np.ndarray, " m"], sizes: Sequence[int]) -> Int64[np.ndarray, " m"]:
    """The order of flags, record by record; record i has `sizes[i]`."""
    part = (step & _STEPS - 1).astype(np.uint8)
    kind = np.minimum(part, _STEPS - 1 - part)
    # Above one draw the error of the head's own log-probabilities blurs the distance.
    kind += (step >= _STEPS).view(np.uint8) << np.uint8(_SHIFT - 1)
    return stable_order(kind, sizes)


def _nearest(step: Int32[np.ndarray, " m"]) -> Int32[np.ndarray, " m"]:
    """The nearest count."""
    return (step >> _SHIFT) + (step >> _SHIFT - 1 & 1)


def _other(
    nearest: Int32[np.ndarray, " m"], step: Int32[np.ndarray, " m"]
) -> Int32[np.ndarray, " m"]:
    """The count on the other side of N·p."""
    return nearest + 1 - 2 * (step >> _SHIFT - 1 & 1)
