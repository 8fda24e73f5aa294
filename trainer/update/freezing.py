"""The parameters that are not frozen, taken out of all parameters and put back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from decant.trainer.update.parameter_names import Path, Tree, matches, names, require_matches


class TrainedPart:
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

    def select(self, tree: Tree) -> Tree:
        """What is trained of a tree that is like the parameters."""
        flat: Any = flatten_dict(tree)
        return unflatten_dict(
            {
                path: flat[path] if layers is None else flat[path][layers]
                for path, layers in self._layers.items()
            }
        )

    def with_zeros(self, trained: Tree, *, like: Tree) -> Tree:
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
