"""The vocabulary split over devices: what each holds of it, and how their parts make one answer.

Inside `jax.shard_map`, code sees the columns of its own device. These few reductions are all that
turns a computation over one device's ids into one over all of them; what travels is a few numbers
a token, never the logits.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """`size` ids, split evenly over the mesh axis `axis` in the order of the devices.

    The last device's columns beyond `size` are no ids: padding. Without an axis all are here.
    """

    size: int
    axis: str | None = None

    @property
    def devices(self) -> int:
        """How many share the vocabulary."""
        return lax.axis_size(self.axis) if self.axis else 1

    def first_id(self, width: int) -> Int[Array, ""] | int:
        """The id of this device's first column of `width`."""
        return lax.axis_index(self.axis) * width if self.axis else 0

    def ids(self, width: int) -> Int[Array, " width"]:
        """The id of each column here."""
        return self.first_id(width) + jnp.arange(width)

    def mask_padding(self, logits: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
        """−inf where a column is no id."""
        if self.devices * logits.shape[-1] == self.size:
            return logits
        return jnp.where(self.ids(logits.shape[-1]) < self.size, logits, -jnp.inf)

    def exclude_padding(self, flags: Bool[Array, "tokens width"]) -> Bool[Array, "tokens width"]:
        """False where a column is no id."""
        if self.devices * flags.shape[-1] == self.size:
            return there
        return flags & (self.ids(flags.shape[-1]) < self.size)

    def sum_over_devices(self, x: Shaped[Array, ...]) -> Shaped[Array, ...]:
        """The sum over devices."""
        return lax.psum(x, self.axis) if self.axis else x

    def sum_both_over_devices(
        self, x: Float[Array, " tokens"], y: Float[Array, " tokens"]
    ) -> tuple[Float[Array, " tokens"], Float[Array, " tokens"]]:
        """Two sums over devices, which travel together."""
        if not self.axis:
            return x, y
        x, y = self.sum_over_devices(jnp.stack([x, y]))
        return x, y

    def max_over_devices(self, x: Float[Array, " tokens"]) -> Float[Array, " tokens"]:
        """The maximum over devices."""
        return lax.pmax(x, self.axis) if self.axis else x

    def gather_columns(self, x: Shaped[Array, "tokens here"]) -> Shaped[Array, "tokens all"]:
        """The columns of all devices side by side, in order."""
        return lax.all_gather(x, self.axis, axis=1, tiled=True) if self.axis else x

    def is_this_device(self, device: Int[Array, ...]) -> Array:
        """Whether `device`, counted along the axis, is this one."""
        return device == (lax.axis_index(self.axis) if self.axis else 0)
