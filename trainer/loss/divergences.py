"""Divergences between teacher and student over *categories*, given as log-probabilities.

There are usually k + 1 categories: the stored tokens in the cache's order, then the tail as one.
Merging tokens can only lower a divergence (data processing). A value is therefore a lower bound of
the divergence over the full vocabulary, and equal to it if every token is stored.
`loss/tail_corrections.py` adds the shape of the tail.

A missing category has log-probability −inf on both sides. It adds neither value nor gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decant.schemas.targets.targets import tail_logmass_at
from decant.served_losses import Divergence, Tail


class TeacherCategories(NamedTuple):
    """The teacher's distribution over the categories at one temperature."""

    logp: Float[Array, "tokens categories"]
    """log p of the stored tokens, then of the tail; all −inf at a position without a target."""
    log_normaliser: Float[Array, " tokens"]
    """Z_β; 0 at a position without a target."""
    tail_logmass: Float[Array, " tokens"]
    """A(β), before normalisation; −inf if the tail is empty."""


def teacher_categories(
    topk_logprobs: Float[Array, "tokens k"],
    tail_logmass: Float[Array, "tokens nodes"],
    *,
    beta: Float[Array, ""] | float,
    tail: Tail,
) -> TeacherCategories:
    """The teacher's k stored tokens and its tail at inverse temperature β.

    Z_β = log(Σ_K exp(β·logp) + exp A(β)), with A from `tail_logmass` at the nodes. With
    tail = "renormalize" the tail is dropped and the stored tokens sum to one.
    """
    head = beta * topk_logprobs
    mass = tail_logmass_at(tail_logmass, beta, xp=jnp)
    if tail == "renormalize":
        mass = jnp.full_like(mass, -jnp.inf)
    unnormalised = jnp.concatenate([head, mass[:, None]], axis=-1)
    normaliser = jax.nn.logsumexp(unnormalised, axis=-1, keepdims=True)
    scored = jnp.isfinite(normaliser)
    safe = jnp.where(scored, normaliser, 0.0)
    return TeacherCategories(
        logp=jnp.where(scored, unnormalised - safe, -jnp.inf),
        log_normaliser=safe[:, 0],
        tail_logmass=mass,
    )


def divergence(
    logp: Float[Array, "tokens categories"],
    logq: Float[Array, "tokens categories"],
    *,
    kind: Divergence,
    mix: float = 0.5,
) -> Float[Array, " tokens"]:
    """D(teacher p, student q) of each position, in nats. `mix` is for kind = "jsd": see `Loss`."""
    if kind == "forward_kl":
        return _kl(logp, logq)
    if kind == "reverse_kl":
        return _kl(logq, logp)
    if kind == "jsd":
        middle = _log_mixture(logp, logq, mix)
        return mix * _kl(logp, middle) + (1 - mix) * _kl(logq, middle)
    assert kind == "tv"
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(logp) - jnp.exp(logq)), axis=-1)


def temperature_scale(
    temperature: Float[Array, ""] | float, *, kind: Divergence
) -> Float[Array, ""] | float:
    """The factor that keeps the gradient's size as T grows: T² (Hinton et al. 2015). T for TV and
    ULD, which are linear in the probabilities."""
    return temperature if kind in ("tv", "uld") else temperature**2


def _kl(
    logp: Float[Array, "tokens categories"], logq: Float[Array, "tokens categories"]
) -> Float[Array, " tokens"]:
    # The double where: p·(log p − log q) at p = 0 is 0·(−inf), whose value *and* gradient are NaN.
    present = jnp.isfinite(logp)
    safe_p, safe_q = jnp.where(present, logp, 0.0), jnp.where(present, logq, 0.0)
    return jnp.sum(jnp.where(present, jnp.exp(safe_p) * (safe_p - safe_q), 0.0), axis=-1)


def _log_mixture(
    logp: Float[Array, "tokens categories"], logq: Float[Array, "tokens categories"], mix: float
) -> Float[Array, "tokens categories"]:
    """log(mix·p + (1 − mix)·q); where both are −inf, a finite number that nothing reads."""
    absent = jnp.isneginf(logp) & jnp.isneginf(logq)
    safe_p, safe_q = jnp.where(absent, 0.0, logp), jnp.where(absent, 0.0, logq)
    return jnp.logaddexp(jnp.log(mix) + safe_p, jnp.log1p(-mix) + safe_q)
