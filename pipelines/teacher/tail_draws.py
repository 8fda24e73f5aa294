"""Draws token ids on the device, as `schemas.targets.draws` and `.counts` define.

A position's draws depend on its probabilities and its start, not on batch, mesh or unit. Each point
is looked up in two stages, the sums of blocks and then one block: the cumulated sum of a whole
vocabulary is slow and accumulates rounding errors.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from decant.models.mesh.vocabulary import Vocabulary
from decant.schemas.targets.draws import EDGE

_BLOCK = 128
_AT_ONCE = 64
"""Points looked up at once: a point takes a block of weights, and 1,024 would take gigabytes."""
_BELOW_ONE = 1 - 2.0**-23


class TailDraws(NamedTuple):
    """The drawn ids, the same on every device."""

    ids: Int[Array, "tokens m"]
    values: Float[Array, "tokens m"]
    """Entries of the `values` given to `draw` at `ids`."""
    near_edge: Bool[Array, "tokens m"]
    """Whether the point lies within `EDGE` times the sum of all weights from an end of its id's
    interval."""


def draw(
    weights: Float[Array, "tokens here"],
    points: Float[Array, "tokens m"],
    *,
    values: Float[Array, "tokens here"],
    vocabulary: Vocabulary,
    of_total: bool = False,
) -> TailDraws:
    """For each point, the id in whose interval of the cumulated weights it lies.

    `weights` and `values` are those of this device's columns. Points run from 0 to the sum of all
    weights, or with `of_total` from 0 to 1 as shares of that sum. A point at or above the sum gives
    the last id with a weight. An id of weight 0 is never drawn.
    """
    tokens, width = weights.shape
    padded = jnp.pad(weights, ((0, 0), (0, -width % _BLOCK)))
    grouped = padded.reshape(tokens, -1, _BLOCK)
    blocks = jnp.sum(grouped, axis=-1)
    ends = jnp.cumsum(blocks, axis=-1)

    def look_up(points: Array) -> TailDraws:
        return _look_up(
            points, grouped, blocks, ends, values=values, vocabulary=vocabulary, of_total=of_total
        )

    m = points.shape[1]
    if m <= _AT_ONCE:
        return look_up(points)
    padded = jnp.pad(points, ((0, 0), (0, -m % _AT_ONCE)))
    groups = padded.reshape(tokens, -1, _AT_ONCE).swapaxes(0, 1)
    drawn = lax.map(look_up, groups)
    return TailDraws(*(x.swapaxes(0, 1).reshape(tokens, -1)[:, :m] for x in drawn))


def _look_up(
    points: Float[Array, "tokens m"],
    grouped: Float[Array, "tokens blocks members"],
    blocks: Float[Array, "tokens blocks"],
    ends: Float[Array, "tokens blocks"],
    *,
    values: Float[Array, "tokens here"],
    vocabulary: Vocabulary,
    of_total: bool,
) -> TailDraws:
    """`draw` for points that fit into memory together.

    `grouped` are the weights in blocks, `blocks` their sums and `ends` the cumulated sums.
    """
    width = values.shape[1]
    here = ends[:, -1:]

    # The device in whose columns a point lies. All devices compute it from the same sums.
    sums = vocabulary.gather_columns(here)
    device_ends = jnp.cumsum(sums, axis=-1)
    total = device_ends[:, -1:]
    inside = jnp.minimum(points * total if of_total else points, total * _BELOW_ONE)
    device = jnp.minimum(_first_above(device_ends[:, None, :], inside), vocabulary.devices - 1)
    rest = inside - jnp.take_along_axis(device_ends - sums, device, axis=-1)
    rest = jnp.clip(rest, 0, here * _BELOW_ONE)

    block = _first_above(ends[:, None, :], rest)
    before = jnp.take_along_axis(ends - blocks, block, axis=-1)
    members = jnp.take_along_axis(grouped, block[:, :, None], axis=1)
    member_ends = jnp.cumsum(members, axis=-1)
    # The two stages round differently: a rest above the block's own sum means its last member.
    rest = jnp.clip(rest - before, 0, member_ends[..., -1] * _BELOW_ONE)
    member = _first_above(member_ends, rest)
    weight, end = (
        jnp.take_along_axis(x, member[..., None], axis=-1)[..., 0] for x in (members, member_ends)
    )
    near = jnp.minimum(rest - (end - weight), end - rest) < EDGE * total

    column = block * _BLOCK + member
    mine = vocabulary.is_this_device(device)
    ids = (column + vocabulary.first_id(width)).astype(jnp.int32)
    own_values = jnp.take_along_axis(values, column, axis=-1)
    return TailDraws(
        ids=vocabulary.sum_over_devices(jnp.where(mine, ids, 0)),
        values=vocabulary.sum_over_devices(jnp.where(mine, own_values, 0)),
        near_edge=vocabulary.sum_over_devices(jnp.where(mine, near, False).astype(jnp.int32)) > 0,
    )


def _first_above(
    ends: Float[Array, " tokens #m bins"], points: Float[Array, "tokens m"]
) -> Int[Array, "tokens m"]:
    """Index of the first bin whose end lies above the point; never a bin of weight 0."""
    return jnp.sum(ends <= points[..., None], axis=-1)
