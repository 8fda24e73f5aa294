"""The tail prior, summed over the calibration sample (defined in `schemas.targets.prior`)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from decant.models.mesh.sharding import DATA, TENSOR
from decant.pipelines.teacher.loaded import DeviceBatch
from decant.pipelines.teacher.sharded_head import Head
from decant.pipelines.teacher.targets import CHUNK_TOKENS, in_tail, split_off_top_k
from decant.schemas.targets.prior import TailPrior
from decant.schemas.targets.targets import BETAS


class PriorSums:
    """Observes a run: sums the tail prior of its rows, batches in float64 on the host."""

    layers = ()

    def __init__(self, *, k: int):
        self._sums = jax.jit(partial(_of_batch, k=k), static_argnames="head")
        self._totals: list[np.ndarray] = []

    def observe(self, batch: DeviceBatch) -> None:
        """Add the batch's sums; blocks until the device is done. Ignores a batch with NaN."""
        counted = batch.inputs["loss_mask"]
        sums = self._sums(batch.hidden, batch.unembedding, counted, head=batch.head)
        new = [np.asarray(x, np.float64) for x in sums]
        if np.isfinite(new[0]).all():
            old = self._totals or [np.zeros_like(x) for x in new]
            self._totals = [a + b for a, b in zip(old, new, strict=True)]

    def result(self) -> TailPrior | None:
        """The tail prior; None if every batch had a NaN."""
        return TailPrior(*self._totals) if self._totals else None


def _of_batch(hidden, unembedding, counted, *, k: int, head: Head):
    """Sums of one batch: each device sums its rows for its ids, then devices are added up."""

    def of_device(hidden, unembedding, counted):
        flat = hidden.reshape(-1, hidden.shape[-1])
        sums = prior_sums(flat, unembedding, counted.reshape(-1), k=k, head=head)
        return lax.psum(sums, DATA)

    out = P(None, TENSOR), P(TENSOR)
    sums, counts = head.on_each_device(of_device, hidden, unembedding, counted, out=out)
    return sums[:, : head.vocabulary.size], counts[: head.vocabulary.size]


def prior_sums(
    hidden: Float[Array, "tokens width"],
    unembedding: Float[Array, "width here"],
    counted: Bool[Array, " tokens"],
    *,
    k: int,
    head: Head,
    chunk: int = CHUNK_TOKENS,
) -> tuple[Float[Array, "nodes here"], Float[Array, " here"]]:
    """Σ p_T(v)·[v in the tail] at each node β = 1/T > 0, and Σ [v in the tail], both by id v.

    The sums run over the `counted` tokens, `chunk` of them at a time. `here` are this device's ids.
    """
    tokens, _ = hidden.shape
    here = unembedding.shape[1]
    chunk = min(chunk, tokens)
    missing = -tokens % chunk
    hidden = jnp.pad(hidden, ((0, missing), (0, 0))).reshape(-1, chunk, hidden.shape[1])
    counted = jnp.pad(counted, (0, missing)).reshape(-1, chunk)

    def add(totals: tuple[Array, Array], xs: tuple[Array, Array]):
        hidden_C, counted_C = xs
        logits = head.logits(hidden_C, unembedding)
        parts = split_off_top_k(logits, k=k, vocabulary=head.vocabulary)
        tail = in_tail(parts, vocabulary=head.vocabulary) & counted_C[:, None]
        top = parts.top - parts.normaliser[:, None]
        normalisers = jnp.stack(
            [
                jnp.logaddexp(
                    jnp.log(jnp.sum(jnp.exp(beta * top), axis=-1)), parts.tail_logmass[:, node]
                )
                for node, beta in enumerate(BETAS[1:], start=1)
            ]
        )
        logprobs = parts.logits - parts.normaliser[:, None]
        sums = _sums_by_id(logprobs, tail, normalisers)
        return (totals[0] + sums, totals[1] + jnp.sum(tail, axis=0)), None

    nothing = jnp.zeros((len(BETAS) - 1, here)), jnp.zeros(here)
    totals, _ = lax.scan(add, nothing, (hidden, counted))
    return totals


def _sums_by_id(
    logprobs: Float[Array, "tokens here"],
    tail: Bool[Array, "tokens here"],
    normalisers: Float[Array, "nodes tokens"],
) -> Float[Array, "nodes here"]:
    """Σ p_T(v)·[v in the tail] over the tokens, at each node.

    On a CPU a token at a time: XLA would sum each column by itself, with a stride of the whole
    vocabulary, in four times the time. The order of additions is the same, and so are the bits.
    """

    def shares(logprobs, tail, z):
        pairs = zip(BETAS[1:], z, strict=True)
        return [jnp.where(tail, jnp.exp(b * logprobs - z[..., None]), 0.0) for b, z in pairs]

    if jax.default_backend() != "cpu":
        return jnp.stack([jnp.sum(p, axis=0) for p in shares(logprobs, tail, normalisers)])

    def add(sums: Array, token: tuple[Array, Array, Array]):
        return sums + jnp.stack(shares(*token)), None

    nothing = jnp.zeros((len(normalisers), logprobs.shape[1]), logprobs.dtype)
    return lax.scan(add, nothing, (logprobs, tail, normalisers.T))[0]
