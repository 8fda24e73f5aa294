"""Hidden states and attention maps on the device, turned into what the cache stores of them."""

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
    read: Bool[Array, "batch time"],
    directions: Float[Array, "width kept"] | None,
    *,
    dtype: HiddenDtype,
) -> dict[str, Array]:
    """The states by what is added to the signal's name: "" [batch, time, kept], and for int8
    "-scale" [batch, time]. `directions` are what they are projected onto; what is not `read` is
    zero."""
    states = states.astype(jnp.float32)
    if directions is not None:
        states = jnp.einsum(
            "btd,dn->btn", states, jnp.asarray(directions), precision=lax.Precision.HIGHEST
        )
    states = jnp.where(read[..., None], states, 0)
    if dtype == "bfloat16":
        return {"": states.astype(jnp.bfloat16)}
    codes, scale = encode_int8(states, xp=jnp)
    return {"": codes, "-scale": scale}


def rows_are_finite(
    states: Float[Array, "batch time width"], segment_ids: Int[Array, "batch time"]
) -> Bool[Array, " batch"]:
    """Whether all of a row's states are finite, padding aside."""
    good = jnp.isfinite(states).all(axis=-1) | (segment_ids == PADDING)
    return good.all(axis=-1)


def map_encoder(signal: AttentionSignal) -> Callable[[Array], Array]:
    """What is kept of a block of queries' probabilities [batch, heads, queries, keys]."""

    def keep(probabilities: Array) -> Array:
        if signal.heads == MEAN:
            probabilities = probabilities.mean(axis=1, keepdims=True)
        if signal.dtype == "bfloat16":
            return probabilities.astype(jnp.bfloat16)
        return encode_log(probabilities, xp=jnp)

    return keep


def zero_unread(
    maps: Shaped[Array, "batch heads time time"], read: Bool[Array, "batch time"]
) -> Shaped[Array, "batch heads time time"]:
    """The maps with zeros for queries that are not `read`, padding's among them."""
    return jnp.where(read[:, None, :, None], maps, jnp.zeros((), maps.dtype))
