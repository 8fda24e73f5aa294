"""Shardings of the optimiser's state on a mesh: moments are sharded like their parameters."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey


def moment_shardings(abstract: Any, *, params: dict[str, Any], mesh: Mesh) -> Any:
    """A sharding for each array of the optimiser's state `abstract`.

    An array with the name and shape of a parameter gets that parameter's sharding. All others
    (counters, factored moments) are small and replicated.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    shardings = {_name(path): (x.shape, x.sharding) for path, x in flat}
    everywhere = NamedSharding(mesh, PartitionSpec())

    def sharding_of(path: tuple, x: Any) -> Any:
        shape, sharding = shardings.get(_name(path), (None, None))
        return sharding if shape == x.shape else everywhere

    return jax.tree_util.tree_map_with_path(sharding_of, abstract)


def _name(path: tuple) -> tuple[str, ...]:
    """The dict keys at the end of a path, which are the parameter's path inside optax's state."""
    keys: list[str] = []
    for entry in reversed(path):
        if not isinstance(entry, DictKey):
            break
        keys.append(str(entry.key))
    return tuple(reversed(keys))
