"""Checksums of arrays on devices: rot on the disk is noticed when a checkpoint is restored.

A checksum depends on the numbers alone, so it is the same on every mesh. The devices that hold the
numbers compute it, so nothing is copied to the host.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

_FACTORS = (0x9E3779B1, 0x85EBCA6B)
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


class ArraySummary(NamedTuple):
    """What is known of an array without keeping it."""

    checksum: str
    finite: bool


def summarise(tree: Any) -> dict[str, ArraySummary]:
    """The summary of each array of a tree, by its path such as `['params']['embedding']`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # All are begun before the first is fetched.
    begun = {jax.tree_util.keystr(path): _program(_whole(x))(x) for path, x in leaves}
    return {name: _summary(sums, finite) for name, (sums, finite) in begun.items()}


def require_finite(arrays: Mapping[str, ArraySummary], *, where: str) -> None:
    """FloatingPointError that names an array with a NaN or an infinity; `where` begins it."""
    for name, array in arrays.items():
        if not array.finite:
            raise FloatingPointError(f"{where}: {name} holds numbers that are not finite")


def _summary(sums: Any, finite: Any) -> ArraySummary:
    return ArraySummary("".join(f"{int(x):08x}" for x in np.asarray(sums)), bool(finite))


def _whole(x: Array) -> NamedSharding | None:
    """A sharding that gives every process the whole result; None on a single device."""
    mesh = getattr(x.sharding, "mesh", None)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


@functools.cache
def _program(whole: NamedSharding | None) -> Any:
    return jax.jit(_sums, out_shardings=whole)


def _sums(x: Array) -> tuple[Array, Array]:
    """Two sums of the array's bits modulo 2³², with odd weights, and whether all is finite.

    Bits of one number that change change both sums, because an odd weight has an inverse. Other
    damage is missed with a probability of about 2⁻⁶⁴.
    """
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        step = jnp.uint32(stride % 2**32)
        place = place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * step
        stride *= x.shape[axis]
    mixed = place ^ (place >> 15)
    weights = (place * jnp.uint32(_FACTORS[0]), mixed * jnp.uint32(_FACTORS[1]))
    sums = jnp.stack([jnp.sum(bits * (w | jnp.uint32(1)), dtype=jnp.uint32) for w in weights])
    return sums, jnp.isfinite(x).all()
