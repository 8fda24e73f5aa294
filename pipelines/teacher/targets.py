"""Targets on the device: exact top-k, the tail grid and draws, a chunk of tokens at a time.

[batch, time, vocabulary] never exists; a chunk's logits are reduced before the next one's are
computed. Logits and weights are those of one device's part of the vocabulary, see
decant.models.mesh.vocabulary; what comes out is the same on all of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from decant.models.mesh.vocabulary import Vocabulary
from decant.pipelines.teacher.sharded_head import Head
from decant.pipelines.teacher.tail_draws import draw
from decant.pipelines.teacher.top_k import top_k
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.targets import BETAS

CHUNK_TOKENS = 256


def targets(
    hidden: Float[Array, "tokens width"],
    unembedding: Float[Array, "width here"],
    starts: Float[Array, " tokens"],
    *,
    spec: TargetSpec,
    head: Head,
    chunk: int = CHUNK_TOKENS,
) -> dict[str, Array]:
    """`ids` int32 [tokens, k], `logprobs` float32 [tokens, k], `tail_logmass` [tokens, nodes];
    with draws, `tail_ids` int32 and `tail_logprobs` float32 [tokens, m], and `near_edge` bool.

    Defined as in schemas.targets.targets and schemas.targets.draws; `starts` are those of the
    draws. `tokens` that `chunk` does not divide are padded inside.
    """

    def one_chunk(hidden_C: Array, starts_C: Array) -> dict[str, Array]:
        logits = head.logits(hidden_C, unembedding)
        return targets_of_logits(logits, starts_C, spec=spec, vocabulary=head.vocabulary)

    return over_chunks(one_chunk, hidden, starts, chunk=chunk)


def over_chunks(
    function: Callable[..., dict[str, Array]], *arrays: Array, chunk: int = CHUNK_TOKENS
) -> dict[str, Array]:
    """`function` of `chunk` tokens at a time, joined; the last chunk is padded with zeros."""
    tokens = len(arrays[0])
    chunk = min(chunk, tokens)

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, [(0, -tokens % chunk)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(-1, chunk, *x.shape[1:])

    _, found = lax.scan(
        lambda _, chunks: (None, function(*chunks)), None, tuple(cut(x) for x in arrays)
    )
    return {name: x.reshape(-1, *x.shape[2:])[:tokens] for name, x in found.items()}


def targets_of_logits(
    logits: Float[Array, "tokens here"],
    starts: Float[Array, " tokens"],
    *,
    spec: TargetSpec,
    vocabulary: Vocabulary,
) -> dict[str, Array]:
    """The same, of logits that are there; those of padding are −inf."""
    parts = split_off_top_k(logits, k=spec.k, vocabulary=vocabulary, betas=spec.betas)
    found = {
        "ids": parts.ids,
        "logprobs": parts.top - parts.normaliser[:, None],
        "tail_logmass": parts.tail_logmass,
    }
    if spec.draws:
        found |= _tail_draws(parts, starts, spec=spec, vocabulary=vocabulary)
    return found


class Parts(NamedTuple):
    """Logits with their top-k taken off. Of the vocabulary, `logits` alone are this device's."""

    logits: Float[Array, "tokens here"]
    ids: Int[Array, "tokens k"]
    top: Float[Array, "tokens k"]
    """Logits of `ids`."""
    normaliser: Float[Array, " tokens"]
    """log Σ exp(logit) over the vocabulary."""
    tail_logmass: Float[Array, "tokens nodes"]


def split_off_top_k(
    logits: Float[Array, "tokens here"],
    *,
    k: int,
    vocabulary: Vocabulary,
    betas: tuple[float, ...] = BETAS,
) -> Parts:
    """The exact top-k, the normaliser and the tail's mass at `betas`: eighths, 0 and 1 included."""
    top, ids = top_k(logits, min(k + 1, vocabulary.size), vocabulary=vocabulary)
    # Without the barrier XLA recomputes the top-k inside what follows.
    logits, top, ids = lax.optimization_barrier((logits, top, ids))
    if k == vocabulary.size:
        normaliser = jax.nn.logsumexp(top, axis=-1)
        tail = jnp.full((len(logits), len(betas)), -jnp.inf)
    else:
        kth, reference = top[:, k - 1], top[:, k]
        relative = _tail_relative(
            logits, kth=kth, reference=reference, k=k, vocabulary=vocabulary, betas=betas
        )
        normaliser = jnp.logaddexp(
            jax.nn.logsumexp(top[:, :k], axis=-1), relative[:, -1] + reference
        )
        shift = jnp.asarray(betas) * (reference - normaliser)[:, None]
        tail = relative + shift
    return Parts(logits, ids[:, :k].astype(jnp.int32), top[:, :k], normaliser, tail)


def in_tail(parts: Parts, *, vocabulary: Vocabulary) -> Bool[Array, "tokens here"]:
    """Which tokens the top-k left out: all below the k-th, and its equals with higher ids."""
    kth = parts.top[:, -1:]
    last = jnp.max(jnp.where(parts.top == kth, parts.ids, -1), axis=-1, keepdims=True)
    ids = vocabulary.ids(parts.logits.shape[-1])
    return (parts.logits < kth) | ((parts.logits == kth) & (ids > last))


def _tail_draws(
    parts: Parts, starts: Float[Array, " tokens"], *, spec: TargetSpec, vocabulary: Vocabulary
) -> dict[str, Array]:
    """m draws from the equal mixture of the tail at the nodes asked for."""
    logprobs = parts.logits - parts.normaliser[:, None]
    shares = [
        jnp.exp(beta * logprobs - parts.tail_logmass[:, spec.betas.index(beta), None])
        for beta in spec.draw_betas
    ]
    there = in_tail(parts, vocabulary=vocabulary)
    weights = jnp.where(there, sum(shares[1:], shares[0]), 0.0)
    total = float(len(shares))
    points = (jnp.arange(spec.draws) + starts[:, None]) * (total / spec.draws)
    # Without the barrier XLA computes the weights once for their sums and again for the blocks.
    weights = lax.optimization_barrier(weights)
    draws = draw(weights, points, values=parts.logits, vocabulary=vocabulary)
    logprobs = draws.values - parts.normaliser[:, None]
    return {"tail_ids": draws.ids, "tail_logprobs": logprobs, "near_edge": draws.near_edge}


def _tail_relative(
    logits: Float[Array, "tokens here"],
    *,
    kth: Float[Array, " tokens"],
    reference: Float[Array, " tokens"],
    k: int,
    vocabulary: Vocabulary,
    betas: tuple[float, ...],
) -> Float[Array, "tokens nodes"]:
    """log Σ_tail exp(β·(logit − reference)); `reference` is the tail's largest logit.

    The tail is masked by value, since a scatter of k ids costs more than the sum: everything
    below the k-th, plus as many equals of the k-th as the top-k left out. One exp a token and
    id; the other nodes are its powers.
    """
    below = logits < kth[:, None]
    eighth = jnp.where(below, jnp.exp((logits - reference[:, None]) / 8), 0.0)
    square = eighth * eighth
    fourth = square * square
    power_of = {1: eighth, 2: square, 3: square * eighth, 4: fourth, 5: fourth * eighth}
    power_of |= {6: fourth * square, 7: fourth * square * eighth, 8: fourth * fourth}
    powers = [power_of[round(8 * beta)] for beta in betas[1:]]
    sums = vocabulary.sum_over_devices(
        jnp.stack([jnp.sum(power, axis=-1) for power in powers], axis=-1)
    )
    size = vocabulary.size - k
    # Equals of the k-th that are in the tail exist only when reference == kth: each adds exp(0).
    left_out = size - vocabulary.sum_over_devices(
        jnp.sum(vocabulary.exclude_padding(below), axis=-1)
    )
    count = jnp.full((len(logits), 1), jnp.log(size))
    return jnp.concatenate([count, jnp.log(sums + left_out[:, None])], axis=-1)
