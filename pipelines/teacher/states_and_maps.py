"""Converts hidden states and attention maps, on the device, to the arrays that a cache stores."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from decant.schemas.records.rows import PADDING
from decant.schemas.signals import MEAN, AttentionSignal, HiddenDtype
from decant.schemas.targets.attention import encode_log
from decant.schemas.targets.hidden import encode_int8


def stored_states(
    states: Float[Array, "batch time width"],
    stored: Bool[Array, "batch time"],
    directions: Float[Array, "width kept"] | None,
    *,
    dtype: HiddenDtype,
) -> dict[str, Array]:
    """The arrays that a signal stores of its layer's states, by suffix of the signal's name.

    "" [batch, time, kept]: the states, projected onto `directions` if given. "-scale"
    [batch, time], for int8 only: the scale of each position. Positions not in `stored` are zero.
    """
    states = states.astype(jnp.float32)
    if directions is not None:
        states = jnp.einsum(
            "btd,dn->btn", states, jnp.asarray(directions), precision=lax.Precision.HIGHEST
        )
    states = jnp.where(stored[..., None], states, 0)
    if dtype == "bfloat16":
        return {"": states.astype(jnp.bfloat16)}
    codes, scale = encode_int8(states, xp=jnp)
    return {"": codes, "-scale": scale}


def rows_are_finite(
    states: Float[Array, "batch time width"], segment_ids: Int[Array, "batch time"]
) -> Bool[Array, " batch"]:
    """Whether each row's states are finite at all positions but padding."""
    good = jnp.isfinite(states).all(axis=-1) | (segment_ids == PADDING)
    return good.all(axis=-1)


def map_encoder(signal: AttentionSignal) -> Callable[[Array], Array]:
    """A function from attention probabilities [batch, heads, queries, keys] of some queries to
    the values that `signal` stores of them."""

    def keep(probabilities: Array) -> Array:
        if signal.heads == MEAN:
            probabilities = probabilities.mean(axis=1, keepdims=True)
        if signal.dtype == "bfloat16":
            return probabilities.astype(jnp.bfloat16)
        return encode_log(probabilities, xp=jnp)

    return keep


def zero_unstored(
    maps: Shaped[Array, "batch heads time time"], stored: Bool[Array, "batch time"]
) -> Shaped[Array, "batch heads time time"]:
    """The maps with zeros for queries that are not in `stored`."""
    return jnp.where(stored[:, None, :, None], maps, jnp.zeros((), maps.dtype))
