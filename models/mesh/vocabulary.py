"""The vocabulary split over devices, and the reductions that combine the devices' parts.

Inside `jax.shard_map`, code sees the columns of its own device. `Vocabulary` has the reductions
that turn a result over one device's ids into one over all ids. They send a few numbers per token,
never the logits.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """`size` ids, split evenly over the mesh axis `axis` in the order of the devices.

    If the devices do not divide `size`, the last device's columns beyond it are padding. `width` is
    the number of columns on one device. Without an axis, this device has all columns, and the
    reductions return their argument.
    """

    size: int
    axis: str | None = None

    @property
    def devices(self) -> int:
        """The number of devices that share the vocabulary."""
        return lax.axis_size(self.axis) if self.axis else 1

    def first_id(self, width: int) -> Int[Array, ""] | int:
        """The id of this device's first column."""
        return lax.axis_index(self.axis) * width if self.axis else 0

    def ids(self, width: int) -> Int[Array, " width"]:
        """The id of each of this device's columns."""
        return self.first_id(width) + jnp.arange(width)

    def mask_padding(self, logits: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
        """The logits, with −inf in padding columns."""
        if self.devices * logits.shape[-1] == self.size:
            return logits
        return jnp.where(self.ids(logits.shape[-1]) < self.size, logits, -jnp.inf)

    def exclude_padding(self, flags: Bool[Array, "tokens width"]) -> Bool[Array, "tokens width"]:
        """The flags, with False in padding columns."""
        if self.devices * flags.shape[-1] == self.size:
            return flags
        return flags & (self.ids(flags.shape[-1]) < self.size)

    def sum_over_devices(self, x: Shaped[Array, ...]) -> Shaped[Array, ...]:
        """The sum of the devices' arrays."""
        return lax.psum(x, self.axis) if self.axis else x

    def sum_both_over_devices(
        self, x: Float[Array, " tokens"], y: Float[Array, " tokens"]
    ) -> tuple[Float[Array, " tokens"], Float[Array, " tokens"]]:
        """Two sums over devices in one message."""
        if not self.axis:
            return x, y
        x, y = self.sum_over_devices(jnp.stack([x, y]))
        return x, y

    def max_over_devices(self, x: Float[Array, " tokens"]) -> Float[Array, " tokens"]:
        """The maximum of the devices' arrays."""
        return lax.pmax(x, self.axis) if self.axis else x

    def take_column(
        self, x: Shaped[Array, "tokens here"], ids: Int[Array, " tokens"]
    ) -> Shaped[Array, " tokens"]:
        """The entry of each token's `ids`, on every device; `x` are this device's columns."""
        width = x.shape[-1]
        column = ids - self.first_id(width)
        mine = (column >= 0) & (column < width)
        own = jnp.take_along_axis(x, jnp.clip(column, 0, width - 1)[:, None], axis=-1)[:, 0]
        return self.sum_over_devices(jnp.where(mine, own, 0))

    def gather_columns(self, x: Shaped[Array, "tokens here"]) -> Shaped[Array, "tokens all"]:
        """The columns of all devices side by side, in the order of the devices."""
        return lax.all_gather(x, self.axis, axis=1, tiled=True) if self.axis else x

    def is_this_device(self, device: Int[Array, ...]) -> Array:
        """Whether `device`, an index along the axis, is this device; elementwise."""
        return device == (lax.axis_index(self.axis) if self.axis else 0)
