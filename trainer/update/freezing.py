"""The parameters that are not frozen: selected from all parameters, and put back among zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from decant.trainer.update.parameter_names import Path, Tree, matches, names, require_matches


class TrainedPart:
    """Selects the parameters that are not frozen from trees with the parameters' structure.

    A frozen layer of a stacked array is cut out; a fully frozen array is absent.
    """

    def __init__(self, params: Tree, *, freeze: Sequence[str]):
        """`freeze` are patterns of parameter names.

        ValueError if a pattern matches no parameter, or all parameters are frozen.
        """
        require_matches(params, freeze, setting="optimiser.freeze")
        self._layers: dict[Path, np.ndarray | None] = {}
        """Trained layers by array; None: every layer. Fully frozen arrays have no entry."""
        for path, array_names in names(params).items():
            trained = np.array([not matches(name, freeze) for name in array_names])
            if trained.any():
                self._layers[path] = None if trained.all() else np.flatnonzero(trained)
        if not self._layers:
            raise ValueError(f"optimiser.freeze = {list(freeze)} leaves nothing to train")

    def select(self, tree: Tree) -> Tree:
        """The trained part of `tree`, which has the structure of the parameters."""
        flat: Any = flatten_dict(tree)
        return unflatten_dict(
            {
                path: flat[path] if layers is None else flat[path][layers]
                for path, layers in self._layers.items()
            }
        )

    def with_zeros(self, trained: Tree, *, like: Tree) -> Tree:
        """A tree with the structure of `like`: `trained` where it has values, zeros elsewhere."""
        flat: Any = flatten_dict(trained)

        def whole(path: Path, array: Any) -> Any:
            if path not in self._layers:
                return jnp.zeros_like(array)
            layers = self._layers[path]
            if layers is None:
                return flat[path]
            return jnp.zeros_like(array).at[layers].set(flat[path])

        return unflatten_dict({p: whole(p, array) for p, array in flatten_dict(like).items()})
