"""Draws from the tail on the device, by two-stage systematic inverse CDF.

What is drawn depends on the position's probabilities and its start alone, not on the batch, the
mesh or the unit. Two stages (sums of blocks, then inside one block) because the cumulated sum of
a whole vocabulary is slow and adds up rounding; see schemas.draws for what the draws mean.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from schemas.draws import EDGE

_BLOCK = 128
_BELOW_ONE = 1 - 2.0**-23


def draw(
    weights: Float[Array, "tokens vocab"],
    points: Float[Array, "tokens m"],
) -> tuple[Int[Array, "tokens m"], Bool[Array, "tokens m"]]:
    """The id in whose share of the cumulated weights each point lies, and whether it lies near an
    end of that share: nearer than `EDGE` times the weights' sum.

    Points run from 0 to the sum of the weights; a point at or beyond the sum finds the last id.
    Ids without weight are never found.
    """
    tokens, vocab = weights.shape
    padded = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK)))
    grouped = padded.reshape(tokens, -1, _BLOCK)
    blocks = jnp.sum(grouped, axis=-1)
    ends = jnp.cumsum(blocks, axis=-1)
    total = ends[:, -1:]
    inside = jnp.minimum(points, total * _BELOW_ONE)
    block = _first_above(ends[:, None, :], inside)
    before = jnp.take_along_axis(ends - blocks, block, axis=-1)
    members = jnp.take_along_axis(grouped, block[:, :, None], axis=1)
    member_ends = jnp.cumsum(members, axis=-1)
    # The two stages round differently: a rest beyond the block's own sum is its last member.
    rest = jnp.clip(inside - before, 0, member_ends[..., -1] * _BELOW_ONE)
    member = _first_above(member_ends, rest)
    weight, end = (
        jnp.take_along_axis(x, member[..., None], axis=-1)[..., 0] for x in (members, member_ends)
    )
    near = jnp.minimum(rest - (end - weight), end - rest) < EDGE * total
    return (block * _BLOCK + member).astype(jnp.int32), near


def _first_above(
    ends: Float[Array, "tokens #m bins"], points: Float[Array, "tokens m"]
) -> Int[Array, "tokens m"]:
    """The first bin whose end lies above the point; a bin without weight never is."""
    return jnp.sum(ends <= points[..., None], axis=-1)
