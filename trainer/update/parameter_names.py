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

from flax.traverse_util import flatten_dict

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
