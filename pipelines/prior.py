"""What calibration adds up for the tail prior, on the device; schemas.prior says what it means."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from models.numerics import logits as head
from pipelines.targets import CHUNK_TOKENS, in_tail, split_off_top_k
from schemas.targets import BETAS


def prior_sums(
    hidden: Float[Array, "tokens width"],
    unembedding: Float[Array, "width vocab"],
    counted: Bool[Array, " tokens"],
    *,
    k: int,
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
        parts = split_off_top_k(head(hidden_C, unembedding), k=k)
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
