"""Tail draws: tokens sampled from a position's tail, and the weight of each draw.

Sampling is systematic, by inverse CDF: m points at distance 1/m, all shifted by one uniform start,
are looked up in the cumulative sums of a *proposal* r over the tail, ids in ascending order. Token
v is drawn m·r(v) times on average. r is an equal mixture of the tail at some of the nodes of
`tail_logmass`:
    r(v) = mean over β of exp(β·logp(v) − A(β))
Σ_i f(v_i) / (m·r(v_i)) is then an unbiased estimate of the sum of f over the tail.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

EDGE = 1e-6
"""Share of the tail. A draw closer than this to an end of its token's interval may become a
neighbouring token under other rounding; captures count such draws."""

_NEVER = np.float32(-1e30)
"""Stands for log 0 in sums where −inf would give NaN."""


@dataclass(frozen=True)
class Draws:
    """The tail draws of n positions. Their order within a position has no meaning.

    `ids` int32 [n, m]; an id may repeat.
    `logprobs` float32 [n, m]: in nats at T = 1 over the full vocabulary; −inf marks a missing
    draw.
    `betas`: β of the nodes that the proposal mixes.
    """

    ids: Int[np.ndarray, "n m"]
    logprobs: Float[np.ndarray, "n m"]
    betas: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, positions: slice | np.ndarray) -> "Draws":
        return Draws(self.ids[positions], self.logprobs[positions], self.betas)

    @property
    def m(self) -> int:
        """Draws per position, at most."""
        return self.ids.shape[1]


TAIL_STREAM, COUNTS_STREAM = b"decant tail draws 1", b"decant counts 1"
"""Names of the streams of starts: each kind of draw has its own."""


def uniform_starts(
    row_key: bytes, *, positions: int, stream: bytes = TAIL_STREAM
) -> Float[np.ndarray, " positions"]:
    """The uniform start in [0, 1) of each position's points, a function of the row's key.

    float32 with 24 random bits from SHAKE-256, so that every machine and release gets equal starts.
    """
    bits = hashlib.shake_256(stream + row_key).digest(4 * positions)
    return (np.frombuffer(bits, "<u4") >> 8).astype(np.float32) * np.float32(2.0**-24)


def logweights(
    draws: Draws, tail_logmass: Float[np.ndarray, "n nodes"], *, nodes: tuple[float, ...]
) -> Float[np.ndarray, "n m"]:
    """−log(m·r(v)) of each draw; −inf marks a missing draw.

    `nodes` are the β of the columns of `tail_logmass`.
    """
    # In float32: as exact as its inputs, and several times as fast as float64.
    # Arrays are [m, n] in memory, as `codecs.decode` gives them; [n, m] would take twice as long.
    logprobs = np.ascontiguousarray(draws.logprobs.T)
    absent = logprobs == -np.inf
    if absent.any():
        logprobs = np.maximum(logprobs, _NEVER)
    first, *others = (
        np.float32(beta) * logprobs - np.maximum(tail_logmass[:, nodes.index(beta)], _NEVER)
        for beta in draws.betas
    )
    log_sum = first
    for share in others:  # log(exp(a) + exp(b)) = max(a, b) + log(1 + exp(−|a − b|))
        ratio = np.exp(-np.abs(log_sum - share))
        log_sum = np.maximum(log_sum, share)
        log_sum += np.log(ratio + np.float32(1))
    weights = np.float32(np.log(len(draws.betas) / draws.m)) - log_sum
    weights[absent] = -np.inf
    return weights.T
