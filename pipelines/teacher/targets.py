"""Targets on the device: top-k, tail mass, draws, labels, counts; a chunk of tokens at a time.

A chunk's logits are reduced before the next chunk's are computed, so an array
[batch, time, vocabulary] never exists. Each device has the logits of its part of the vocabulary
(`models.mesh.vocabulary`); the targets are the same on all devices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from decant.models.mesh.top_k import top_k
from decant.models.mesh.vocabulary import Vocabulary
from decant.pipelines.teacher.sharded_head import Head
from decant.pipelines.teacher.tail_draws import draw
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.targets import BETAS

CHUNK_TOKENS = 256


@dataclass(frozen=True)
class LogitsSpec:
    """What is computed from a position's logits."""

    targets: TargetSpec | None = None
    """Targets of the signal `logits`; None if they are not asked for."""
    counts: int = 0
    """N, draws of the signal `counts`; 0 if they are not asked for."""


class TokenInputs(NamedTuple):
    """What `targets` needs of each token besides its hidden state; None if the spec has no use."""

    starts: Float[Array, " tokens"] | None = None
    """Uniform starts of the tail draws."""
    labels: Int[Array, " tokens"] | None = None
    """The text's next token."""
    counts_starts: Float[Array, " tokens"] | None = None
    """Uniform starts of the counts' draws."""


def targets(
    hidden: Float[Array, "tokens width"],
    unembedding: Float[Array, "width here"],
    inputs: TokenInputs,
    *,
    spec: LogitsSpec,
    head: Head,
    chunk: int = CHUNK_TOKENS,
) -> dict[str, Array]:
    """What `spec` asks for, from the states after the final norm.

    `ids` int32 [tokens, k], `logprobs` float32 [tokens, k] and `tail_logmass` float32
    [tokens, nodes], as `schemas.targets.targets` defines them, none of them for k = 0. With draws
    also `tail_ids` int32, `tail_logprobs` float32 and `near_edge` bool, each [tokens, m]. With
    labels `label_logprobs` float32 [tokens]. With counts `count_ids` int32 [tokens, N], ascending
    and repeated, and `counts_near_edge` bool [tokens, N]. `chunk` need not divide the number of
    tokens.
    """

    def one_chunk(hidden_C: Array, inputs_C: TokenInputs) -> dict[str, Array]:
        logits = head.logits(hidden_C, unembedding)
        return targets_of_logits(logits, inputs_C, spec=spec, vocabulary=head.vocabulary)

    return over_chunks(one_chunk, hidden, inputs, chunk=chunk)


def over_chunks(
    function: Callable[..., dict[str, Array]], *arrays: Any, chunk: int = CHUNK_TOKENS
) -> dict[str, Array]:
    """Apply `function` to `chunk` tokens of `arrays` at a time and join the results.

    `arrays` are arrays or trees of them. The last chunk is padded with zeros.
    """
    tokens = len(arrays[0])
    chunk = min(chunk, tokens)

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, [(0, -tokens % chunk)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(-1, chunk, *x.shape[1:])

    _, results = lax.scan(
        lambda _, chunks: (None, function(*chunks)), None, jax.tree.map(cut, arrays)
    )
    return {name: x.reshape(-1, *x.shape[2:])[:tokens] for name, x in results.items()}


def targets_of_logits(
    logits: Float[Array, "tokens here"],
    inputs: TokenInputs,
    *,
    spec: LogitsSpec,
    vocabulary: Vocabulary,
) -> dict[str, Array]:
    """The same as `targets`, from logits. Logits of padding columns are −inf."""
    fields: dict[str, Array] = {}
    asked = spec.targets
    if asked and asked.k:
        split = split_off_top_k(logits, k=asked.k, vocabulary=vocabulary, betas=asked.betas)
        logits, normaliser = split.logits, split.normaliser
        fields |= {
            "ids": split.ids,
            "logprobs": split.top - normaliser[:, None],
            "tail_logmass": split.tail_logmass,
        }
        if asked.draws:
            fields |= _tail_draws(split, inputs.starts, spec=asked, vocabulary=vocabulary)
    else:
        normaliser = _log_sum_exp(logits, vocabulary=vocabulary)
    if asked and asked.labels:
        assert inputs.labels is not None
        own = vocabulary.take_column(logits, inputs.labels)
        fields["label_logprobs"] = own - normaliser
    if spec.counts:
        fields |= _counts(logits, inputs.counts_starts, draws=spec.counts, vocabulary=vocabulary)
    return fields


def _log_sum_exp(
    logits: Float[Array, "tokens here"], *, vocabulary: Vocabulary
) -> Float[Array, " tokens"]:
    """log Σ exp(logit) over the vocabulary."""
    largest = vocabulary.max_over_devices(jnp.max(logits, axis=-1))
    here = jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1)
    return jnp.log(vocabulary.sum_over_devices(here)) + largest


def _counts(
    logits: Float[Array, "tokens here"],
    starts: Float[Array, " tokens"] | None,
    *,
    draws: int,
    vocabulary: Vocabulary,
) -> dict[str, Array]:
    """Equally spaced draws from the whole distribution.

    The normaliser is not used, because it rounds in other ways if the top-k is computed too.
    """
    assert starts is not None
    largest = vocabulary.max_over_devices(jnp.max(logits, axis=-1))
    # Without the barrier XLA computes the weights twice, for their sums and for the blocks.
    weights = lax.optimization_barrier(jnp.exp(logits - largest[:, None]))
    points = (jnp.arange(draws) + starts[:, None]) / draws
    drawn = draw(weights, points, values=logits, vocabulary=vocabulary, of_total=True)
    return {"count_ids": drawn.ids, "counts_near_edge": drawn.near_edge}


class SplitLogits(NamedTuple):
    """Logits and their top-k. Only `logits` are this device's; all other fields are replicated."""

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
) -> SplitLogits:
    """The exact top-k, the normaliser, and the tail's log mass at each of `betas`.

    `betas` are multiples of 1/8 in ascending order, from 0 to 1.
    """
    top, ids = top_k(logits, min(k + 1, vocabulary.size), vocabulary=vocabulary)
    # Without the barrier XLA computes the top-k again for each of its uses.
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
    return SplitLogits(logits, ids[:, :k].astype(jnp.int32), top[:, :k], normaliser, tail)


def in_tail(split: SplitLogits, *, vocabulary: Vocabulary) -> Bool[Array, "tokens here"]:
    """Whether each token of the vocabulary is outside the top-k: its logit is below the k-th, or
    equal to it with a higher id than the last of the top-k with this logit."""
    kth = split.top[:, -1:]
    last = jnp.max(jnp.where(split.top == kth, split.ids, -1), axis=-1, keepdims=True)
    ids = vocabulary.ids(split.logits.shape[-1])
    return (split.logits < kth) | ((split.logits == kth) & (ids > last))


def _tail_draws(
    split: SplitLogits,
    starts: Float[Array, " tokens"] | None,
    *,
    spec: TargetSpec,
    vocabulary: Vocabulary,
) -> dict[str, Array]:
    """m draws from the equal mixture of the tails at the nodes `spec.draw_betas`."""
    assert starts is not None
    logprobs = split.logits - split.normaliser[:, None]
    shares = [
        jnp.exp(beta * logprobs - split.tail_logmass[:, spec.betas.index(beta), None])
        for beta in spec.draw_betas
    ]
    there = in_tail(split, vocabulary=vocabulary)
    weights = jnp.where(there, sum(shares[1:], shares[0]), 0.0)
    total = float(len(shares))
    points = (jnp.arange(spec.draws) + starts[:, None]) * (total / spec.draws)
    # Without the barrier XLA computes the weights twice, for their sums and for the blocks.
    weights = lax.optimization_barrier(weights)
    draws = draw(weights, points, values=split.logits, vocabulary=vocabulary)
    logprobs = draws.values - split.normaliser[:, None]
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

    The tail is masked by value, because a scatter of k ids costs more than the sum: all logits
    below the k-th, plus as many equal to the k-th as the top-k left out. There is one exp per token
    and id, at β = 1/8; the other nodes are powers of it.
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
    # The tail has logits equal to the k-th only if reference == kth; each then adds exp(0).
    left_out = size - vocabulary.sum_over_devices(
        jnp.sum(vocabulary.exclude_padding(below), axis=-1)
    )
    count = jnp.full((len(logits), 1), jnp.log(size))
    return jnp.concatenate([count, jnp.log(sums + left_out[:, None])], axis=-1)
