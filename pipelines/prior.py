"""What calibration adds up for the tail prior; schemas.prior says what it means."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from models.numerics import logits as head
from pipelines.targets import CHUNK_TOKENS, in_tail, split_off_top_k
from pipelines.teacher import OnDevice
from schemas.prior import TailPrior
from schemas.targets import BETAS


class PriorSums:
    """Observes a run: the tail prior of its rows, added up in float64."""

    layers = ()

    def __init__(self, *, k: int):
        self._sums = jax.jit(partial(_of_batch, k=k), static_argnames="softcap")
        self._totals: list[np.ndarray] = []

    def see(self, batch: OnDevice) -> None:
        """Add a batch's; waits for it. A row with NaN spoils its batch, which then is left out."""
        found = self._sums(
            batch.hidden, batch.unembedding, batch.inputs["loss_mask"], softcap=batch.softcap
        )
        new = [np.asarray(x, np.float64) for x in found]
        if np.isfinite(new[0]).all():
            old = self._totals or [np.zeros_like(x) for x in new]
            self._totals = [a + b for a, b in zip(old, new, strict=True)]

    def result(self) -> TailPrior | None:
        """What `schemas.prior` stores; None if every batch was spoilt."""
        return TailPrior(*self._totals) if self._totals else None


def _of_batch(hidden, unembedding, counted, *, k: int, softcap: float | None):
    flat = hidden.reshape(-1, hidden.shape[-1])
    return prior_sums(flat, unembedding, counted.reshape(-1), k=k, softcap=softcap)


def prior_sums(
    hidden: Float[Array, "tokens width"],
    unembedding: Float[Array, "width vocab"],
    counted: Bool[Array, " tokens"],
    *,
    k: int,
    softcap: float | None = None,
    chunk: int = CHUNK_TOKENS,
) -> tuple[Float[Array, "nodes vocab"], Float[Array, " vocab"]]:
    """Σ p_T(v)·[v in the tail] at the nodes β > 0, and Σ [v in the tail], over counted tokens."""
    tokens, _ = hidden.shape
    vocab = unembedding.shape[1]
    chunk = min(chunk, tokens)
    missing = -tokens % chunk
    hidden = jnp.pad(hidden, ((0, missing), (0, 0))).reshape(-1, chunk, hidden.shape[1])
    counted = jnp.pad(counted, (0, missing)).reshape(-1, chunk)

    def add(totals: tuple[Array, Array], xs: tuple[Array, Array]):
        hidden_C, counted_C = xs
        parts = split_off_top_k(head(hidden_C, unembedding, softcap=softcap), k=k)
        there = in_tail(parts) & counted_C[:, None]
        logprobs = parts.logits - parts.normaliser[:, None]
        top = parts.top - parts.normaliser[:, None]
        sums = []
        for node, beta in enumerate(BETAS[1:], start=1):
            z = jnp.logaddexp(
                jnp.log(jnp.sum(jnp.exp(beta * top), axis=-1)), parts.tail_logmass[:, node]
            )
            p = jnp.exp(beta * logprobs - z[:, None])
            sums.append(jnp.sum(jnp.where(there, p, 0.0), axis=0))
        return (totals[0] + jnp.stack(sums), totals[1] + jnp.sum(there, axis=0)), None

    nothing = jnp.zeros((len(BETAS) - 1, vocab)), jnp.zeros(vocab)
    totals, _ = lax.scan(add, nothing, (hidden, counted))
    return totals
