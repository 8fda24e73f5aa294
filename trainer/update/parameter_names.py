"""Names of parameters, and the patterns such as `layers.*norm` that match them.

Parameters are named `embedding`, `layers.0.query`, …, `final_norm`, `head`, and `projections.NAME`
for projections. In a model with blocks of linear attention, they are `linear_layers.0` … and
`full_layers.0` …, each counted by itself; so are the kinds of Gemma 4, `window_layers.0` …. One
array stacks a parameter of all blocks; here each layer of the array has its own name, so that
patterns can select single layers.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from flax.traverse_util import flatten_dict

STACKED, LAYERS = ("first_blocks", "blocks", "linear_blocks"), "layers"
_BLOCKS = "blocks"
Path = tuple[str, ...]
Tree = Any
"""Nested dicts of arrays with the structure of the parameters."""


def names(params: Tree) -> dict[Path, list[str]]:
    """The names of each array: one name for each layer of a stacked array, else a single one."""
    flat: dict[Path, Any] = flatten_dict(params)
    early = max((len(array) for path, array in flat.items() if path[0] == STACKED[0]), default=0)
    stacks = {path[0] for path in flat if path[0].endswith(_BLOCKS)}
    groups = {stack: stack.removesuffix(_BLOCKS) + LAYERS for stack in stacks}
    groups |= dict.fromkeys(STACKED[:2], LAYERS)
    if STACKED[2] in stacks:
        groups[STACKED[1]] = f"full_{LAYERS}"
    return {
        path: _names(path, array, groups=groups, first=early if path[0] == STACKED[1] else 0)
        for path, array in flat.items()
    }


def _names(path: Path, array: Any, *, groups: dict[str, str], first: int) -> list[str]:
    if path[0] not in groups:
        return [".".join(path)]
    layers = range(first, first + array.shape[0])
    return [".".join((groups[path[0]], str(layer), *path[1:])) for layer in layers]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the parameter `name` or a group that contains it.

    `layers.0` matches `layers.0.query`. `*` stands for any characters, dots included.
    """
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in patterns)


def require_matches(params: Tree, patterns: Sequence[str], *, setting: str) -> None:
    """ValueError if a pattern matches no parameter. The message begins with `setting`."""
    known = [name for array_names in names(params).values() for name in array_names]
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in known):
            first = [array_names[0] for array_names in names(params).values()]
            near = difflib.get_close_matches(pattern, known, n=1)
            hint = f"did you mean {near[0]}? There" if near else "There"
            raise ValueError(
                f"{setting}: no parameter is called {pattern!r}; {hint} are {', '.join(first)}"
                + (", and the same in every other layer" if STACKED[1] in params else "")
            )
