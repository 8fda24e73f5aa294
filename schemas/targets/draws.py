"""Draws from a position's tail: which tokens, and what each one stands for.

m points at distance 1/m, all moved by one uniform start, are looked up in the cumulated
probabilities of a *proposal* r over the tail (systematic sampling by inverse CDF, ids in their
natural order), so that token v is drawn m·r(v) times on average. r is an equal mixture of the
tail at some of the nodes of `tail_logmass`:
    r(v) = mean over β of exp(β·logp(v) − A(β))
A sum of f over the tail is then estimated without bias by Σ_i f(v_i) / (m·r(v_i)).
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

EDGE = 1e-6
"""A draw whose point is nearer than this (as a share of the tail) to where its token's interval
ends may turn out as a neighbour where arithmetic rounds otherwise; captures count these."""

_NEVER = np.float32(-1e30)
"""Stands for log 0 where −inf would make NaN."""


@dataclass(frozen=True)
class Draws:
    """The draws of n positions; their order within one means nothing.

    `ids` int32 [n, m]; an id may repeat.
    `logprobs` float32 [n, m] in nats at T = 1 over the full vocabulary; −inf where there is no
    draw.
    `betas` of the proposal's nodes.
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
        """Draws a position, at most."""
        return self.ids.shape[1]


def uniform_starts(row_key: bytes, *, positions: int) -> Float[np.ndarray, " positions"]:
    """The uniform start in [0, 1) of each position's points, a function of the row's content.

    float32 with 24 random bits, from SHAKE-256: the same on every machine and for ever.
    """
    stream = hashlib.shake_256(b"decant tail draws 1" + row_key).digest(4 * positions)
    return (np.frombuffer(stream, "<u4") >> 8).astype(np.float32) * np.float32(2.0**-24)


def logweights(
    draws: Draws, tail_logmass: Float[np.ndarray, "n nodes"], *, nodes: tuple[float, ...]
) -> Float[np.ndarray, "n m"]:
    """−log(m·r(v)) of each draw, from A at `nodes`; −inf where there is no draw."""
    # In float32, which is as exact as what it is given and several times as fast.
    # Draw by draw as `codecs.decode` gives them: rows of m would take twice as long.
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
        further = np.exp(-np.abs(log_sum - share))
        log_sum = np.maximum(log_sum, share)
        log_sum += np.log(further + np.float32(1))
    weights = np.float32(np.log(len(draws.betas) / draws.m)) - log_sum
    weights[absent] = -np.inf
    return weights.T
