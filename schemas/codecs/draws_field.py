"""Codecs of tail draws: a multiset of ids per position, with a log-probability per draw.

`EXACT` keeps the order of draws and the float32 bits. `QUANTISED` sorts a position's draws by the
rank of their ids among all draws and stores distances between ranks. It stores log-probabilities as
multiples of 1/8 nat below the last stored top-k log-probability. Rounding is symmetric, so that
weights stay right on average, within 7e-4.
"""

import struct
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer

from decant.schemas.codecs import lossless, numbers
from decant.schemas.codecs.block import Tables
from decant.schemas.codecs.fast import permutation
from decant.schemas.codecs.streams import (
    cells,
    column_runs,
    compress,
    cumsum_in_place,
    decompress,
    escape,
    fill_columns,
    gather_columns,
    grid,
    join,
    run_heights,
    split,
    unescape,
)
from decant.schemas.targets.draws import Draws
from decant.schemas.targets.targets import BETAS

EXACT = 1
QUANTISED = 2

_PER_NAT = 8
_ABOVE = _PER_NAT
"""Levels reserved for draws above the last stored log-probability as it was rounded."""
_ABSENT = 65535
_RANK_FRAMES = 8
_LOGPROB_FRAMES = 2
_ENTRIES_PER_FRAME = 2048
"""Fewest entries in a zstd frame, so that the frame's own Huffman table pays off."""
_HEADER = struct.Struct("<HB")


def encode_exact(draws: Draws, *, vocabulary: int) -> bytes:
    """The header, then ids and float32 bits as `codecs/lossless.py` stores them."""
    return _header(draws) + lossless.encode(draws.ids, draws.logprobs, vocabulary=vocabulary)


def decode_exact(payloads: Sequence[bytes], *, positions: Sequence[int], vocabulary: int) -> Draws:
    """The draws that `encode_exact` was given, records one after another."""
    m, betas = _read_header(payloads)
    ids, logprobs = lossless.decode(
        payloads, start=_HEADER.size, positions=positions, k=m, vocabulary=vocabulary
    )
    return Draws(ids, logprobs, betas)


def fit(
    draws: Draws, *, order: Integer[np.ndarray, " listed"], vocabulary: int
) -> dict[str, np.ndarray]:
    """The table `draw-order`: drawn ids by falling frequency, then the other ids of `order`."""
    counts = np.bincount(draws.ids.reshape(-1), minlength=vocabulary).astype(np.float64)
    # Ids of top-k sets that were never drawn follow all drawn ids, in the order of `order`.
    counts[order] += np.linspace(0.5, 0.1, len(order))
    listed = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    return {"draw-order": listed.astype(np.int32)}


def encode_quantised(
    draws: Draws, *, last: Float[np.ndarray, " n"], tables: Tables, vocabulary: int
) -> bytes:
    """The header, then sections: raw bits of distances, escapes, levels, symbols of distances.

    `last` is the decoded value of each position's last stored top-k log-probability.
    """
    _, rank = permutation(tables, vocabulary=vocabulary, name="draw-order")
    below = _base(last) - np.where(np.isfinite(draws.logprobs), draws.logprobs, 0)
    level = np.clip(np.rint(below * np.float32(_PER_NAT)), 0, _ABSENT - 1).astype(np.uint32)
    level = np.where(np.isfinite(draws.logprobs), level, np.uint32(_ABSENT))
    keys = np.sort(rank[draws.ids].astype(np.uint64) << np.uint64(16) | level, axis=1)
    ranks = np.ascontiguousarray(keys.T >> np.uint64(16)).astype(np.int32)
    ranks[1:] -= ranks[:-1].copy()
    symbols, raw = numbers.encode(ranks)
    codes, escapes = escape(np.ascontiguousarray(keys.T & np.uint64(_ABSENT)).astype(np.uint32))
    m, n = codes.shape
    return _header(draws) + join(
        [
            raw,
            escapes,
            *(
                compress(codes[rows])
                for rows in column_runs(m, _frames(m, n, most=_LOGPROB_FRAMES))
            ),
            *(compress(symbols[rows]) for rows in column_runs(m, _frames(m, n, most=_RANK_FRAMES))),
        ]
    )


def decode_quantised(
    payloads: Sequence[bytes],
    *,
    positions: Sequence[int],
    last: Float[np.ndarray, " n"],
    tables: Tables,
    vocabulary: int,
) -> Draws:
    """The draws in the order of their ids' ranks, records one after another.

    Log-probabilities are not normalised. `last` is as in `encode_quantised`.
    """
    m, betas = _read_header(payloads)
    codes, symbols = (grid(m, positions) for _ in range(2))
    raw, escapes = [], []
    for cell, payload, n in zip(cells(positions), payloads, positions, strict=True):
        of_frames = [
            *run_heights(m, _frames(m, n, most=_LOGPROB_FRAMES)),
            *run_heights(m, _frames(m, n, most=_RANK_FRAMES)),
        ]
        own_raw, own_escapes, *frames = split(payload, start=_HEADER.size, count=2 + len(of_frames))
        raw.append(own_raw)
        escapes.append(own_escapes)
        flat = decompress(frames, sizes=[height * n for height in of_frames])
        fill_columns(codes[:, cell], flat[: m * n], [n])
        fill_columns(symbols[:, cell], flat[m * n :], [n])
    ranks = cumsum_in_place(numbers.decode(symbols, raw))
    if ranks.view(np.uint32).max() >= vocabulary:  # true too if a sum overflowed int32
        raise ValueError("the rank of a draw is outside the vocabulary")
    order, _ = permutation(tables, vocabulary=vocabulary, name="draw-order")
    levels = gather_columns(unescape(codes, escapes, columns=positions), positions)
    logprobs = _base(last)[:, 0] - levels * np.float32(1 / _PER_NAT)
    if levels.dtype != np.uint8:  # without escapes no draw is missing
        logprobs[levels == _ABSENT] = -np.inf
    ids = order.take(gather_columns(ranks, positions), mode="clip")
    return Draws(ids.T, logprobs.T, betas)


def _frames(m: int, n: int, *, most: int) -> int:
    """Number of frames, at most `most`, that an array [m, n] is cut into."""
    return max(1, min(most, m * n // _ENTRIES_PER_FRAME))


def _base(last: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n 1"]:
    return (np.where(np.isfinite(last), last, 0) + np.float32(_ABOVE / _PER_NAT))[:, None]


def _header(draws: Draws) -> bytes:
    return _HEADER.pack(draws.m, sum(1 << BETAS.index(beta) for beta in draws.betas))


def header_of(payload: bytes) -> bytes:
    """The header: m and the proposal's nodes. Records decoded together share it."""
    return payload[: _HEADER.size]


def count(payload: bytes) -> int:
    """m, the draws per position; 0 if the header is cut off."""
    return _HEADER.unpack(header_of(payload))[0] if len(payload) >= _HEADER.size else 0


def _read_header(payloads: Sequence[bytes]) -> tuple[int, tuple[float, ...]]:
    (header,) = {header_of(payload) for payload in payloads}
    if len(header) < _HEADER.size:
        raise ValueError(f"draws of {len(header)} bytes")
    m, mask = _HEADER.unpack(header)
    betas = tuple(beta for node, beta in enumerate(BETAS) if mask >> node & 1)
    if not m or not betas or mask >> len(BETAS) or mask & 1:
        raise ValueError(f"{m} draws from the nodes of mask {mask:#x}")
    return m, betas
