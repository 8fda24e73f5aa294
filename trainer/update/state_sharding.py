"""Where the state of training lives: what is kept for each parameter lies where that one does."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey


def moment_shardings(abstract: Any, *, params: dict[str, Any], mesh: Mesh) -> Any:
    """A sharding for each array of an optimiser's state.

    Those of a parameter's name and shape lie like it; the rest (counters, factored moments) is
    small and whole on every device.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    places = {_name(path): (x.shape, x.sharding) for path, x in flat}
    everywhere = NamedSharding(mesh, PartitionSpec())

    def of(path: tuple, x: Any) -> Any:
        shape, sharding = places.get(_name(path), (None, None))
        return sharding if shape == x.shape else everywhere

    return jax.tree_util.tree_map_with_path(of, abstract)


def _name(path: tuple) -> tuple[str, ...]:
    """The keys of dicts at the end of a path: a parameter's own, in whatever it is wrapped."""
    keys: list[str] = []
    for entry in reversed(path):
        if not isinstance(entry, DictKey):
            break
        keys.append(str(entry.key))
    return tuple(reversed(keys))
