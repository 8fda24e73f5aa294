"""Draws from the tail on the device, by two-stage systematic inverse CDF.

What is drawn depends on the position's probabilities and its start alone, not on the batch, the
mesh or the unit. Two stages (sums of blocks, then inside one block) because the cumulated sum of
a whole vocabulary is slow and adds up rounding; see schemas.targets.draws for what the draws mean.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decant.models.mesh.vocabulary import Vocabulary
from decant.schemas.targets.draws import EDGE

_BLOCK = 128
_BELOW_ONE = 1 - 2.0**-23


class TailDraws(NamedTuple):
    """What was drawn, the same on every device."""

    ids: Int[Array, "tokens m"]
    values: Float[Array, "tokens m"]
    """Those of `ids`."""
    near_edge: Bool[Array, "tokens m"]
    """Whether the point lies nearer than `EDGE` times the weights' sum to an end of its share."""


def draw(
    weights: Float[Array, "tokens here"],
    points: Float[Array, "tokens m"],
    *,
    values: Float[Array, "tokens here"],
    vocabulary: Vocabulary,
) -> TailDraws:
    """The id in whose share of the cumulated weights each point lies.

    `weights` and `values` are this device's. Points run from 0 to the sum of all weights; a point
    at or beyond the sum finds the last id. Ids without weight are never found.
    """
    tokens, width = weights.shape
    padded = jnp.pad(weights, ((0, 0), (0, -width % _BLOCK)))
    grouped = padded.reshape(tokens, -1, _BLOCK)
    blocks = jnp.sum(grouped, axis=-1)
    ends = jnp.cumsum(blocks, axis=-1)
    here = ends[:, -1:]

    # Which device's share a point lies in, by the same few numbers on every device.
    sums = vocabulary.gather_columns(here)
    device_ends = jnp.cumsum(sums, axis=-1)
    total = device_ends[:, -1:]
    inside = jnp.minimum(points, total * _BELOW_ONE)
    device = jnp.minimum(_first_above(device_ends[:, None, :], inside), vocabulary.devices - 1)
    rest = inside - jnp.take_along_axis(device_ends - sums, device, axis=-1)
    rest = jnp.clip(rest, 0, here * _BELOW_ONE)

    block = _first_above(ends[:, None, :], rest)
    before = jnp.take_along_axis(ends - blocks, block, axis=-1)
    members = jnp.take_along_axis(grouped, block[:, :, None], axis=1)
    member_ends = jnp.cumsum(members, axis=-1)
    # The two stages round differently: a rest beyond the block's own sum is its last member.
    rest = jnp.clip(rest - before, 0, member_ends[..., -1] * _BELOW_ONE)
    member = _first_above(member_ends, rest)
    weight, end = (
        jnp.take_along_axis(x, member[..., None], axis=-1)[..., 0] for x in (members, member_ends)
    )
    near = jnp.minimum(rest - (end - weight), end - rest) < EDGE * total

    column = block * _BLOCK + member
    mine = vocabulary.is_this_device(device)
    ids = (column + vocabulary.first_id(width)).astype(jnp.int32)
    found = jnp.take_along_axis(values, column, axis=-1)
    return TailDraws(
        ids=vocabulary.sum_over_devices(jnp.where(mine, ids, 0)),
        values=vocabulary.sum_over_devices(jnp.where(mine, found, 0)),
        near_edge=vocabulary.sum_over_devices(jnp.where(mine, near, False).astype(jnp.int32)) > 0,
    )


def _first_above(
    ends: Float[Array, "tokens #m bins"], points: Float[Array, "tokens m"]
) -> Int[Array, "tokens m"]:
    """The first bin whose end lies above the point; a bin without weight never is."""
    return jnp.sum(ends <= points[..., None], axis=-1)
