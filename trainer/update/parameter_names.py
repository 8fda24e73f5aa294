"""Which parameters a pattern such as `layers.*norm` names, and those that are trained.

Parameters are called `embedding`, `layers.0.query`, …, `final_norm`, `head`, and those that are
trained beside the student `projections.NAME`. Blocks are stacked in memory, one array for all
layers; here each layer of it has a name of its own, so that some of them can be frozen.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

STACKED, LAYERS = "blocks", "layers"
Path = tuple[str, ...]
Tree = Any
"""Parameters, or what is like them: dicts in dicts of arrays."""


def names(params: Tree) -> dict[Path, list[str]]:
    """What each array's parameters are called: one name, or one a layer."""
    return {path: _names(path, array) for path, array in flatten_dict(params).items()}


def _names(path: Path, array: Any) -> list[str]:
    if path[0] != STACKED:
        return [".".join(path)]
    return [".".join((LAYERS, str(layer), *path[1:])) for layer in range(array.shape[0])]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern names the parameter, or what it is part of: `layers.0` its `query` too.

    `*` stands for any characters, dots too.
    """
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in patterns)


def require_matches(params: Tree, patterns: Sequence[str], *, setting: str) -> None:
    """ValueError for a pattern that names no parameter."""
    known = [name for some in names(params).values() for name in some]
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in known):
            first = [some[0] for some in names(params).values()]
            near = difflib.get_close_matches(pattern, known, n=1)
            hint = f"did you mean {near[0]}? There" if near else "There"
            raise ValueError(
                f"{setting}: no parameter is called {pattern!r}; {hint} are {', '.join(first)}"
                + (" and the same of the other layers" if STACKED in params else "")
            )


class Trained:
    """The parameters that are not frozen, as a tree of their own that an optimiser works on."""

    def __init__(self, params: Tree, *, freeze: Sequence[str]):
        """ValueError if a pattern names nothing, or together they name everything."""
        require_matches(params, freeze, setting="optimiser.freeze")
        self._layers: dict[Path, np.ndarray | None] = {}
        """Which layers of an array are trained; None: all there is of it. Others are not here."""
        for path, called in names(params).items():
            moves = np.array([not matches(name, freeze) for name in called])
            if moves.any():
                self._layers[path] = None if moves.all() else np.flatnonzero(moves)
        if not self._layers:
            raise ValueError(f"optimiser.freeze = {list(freeze)} leaves nothing to train")

    def of(self, tree: Tree) -> Tree:
        """What is trained of a tree that is like the parameters."""
        flat: Any = flatten_dict(tree)
        return unflatten_dict(
            {
                path: flat[path] if layers is None else flat[path][layers]
                for path, layers in self._layers.items()
            }
        )

    def spread(self, trained: Tree, *, like: Tree) -> Tree:
        """The whole tree again, zero where nothing is trained."""
        flat: Any = flatten_dict(trained)

        def whole(path: Path, array: Any) -> Any:
            if path not in self._layers:
                return jnp.zeros_like(array)
            layers = self._layers[path]
            if layers is None:
                return flat[path]
            return jnp.zeros_like(array).at[layers].set(flat[path])

        return unflatten_dict({p: whole(p, array) for p, array in flatten_dict(like).items()})
