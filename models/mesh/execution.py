"""How a forward pass is run: on which mesh, and what of it is kept for the backward pass.

Neither changes what is computed but for rounding. Over `fsdp` a block's matrices are gathered where
the block uses them, in the dtype that products take, and again on the way back: no device ever
holds more than its share of the model and one block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, DTypeLike

from decant.models.mesh.remat import Remat
from decant.models.mesh.sharding import FSDP, partition_spec

PRODUCTS = "products with weights"
"""Name of what `remat = "dots"` keeps: of a block queries, keys, values and the gated MLP's two."""
_GATHERED = "gathered weights"


class Execution(NamedTuple):
    """Without a mesh arrays stay where they are; hashable, so that programs may depend on it."""

    mesh: Mesh | None = None
    remat: Remat = "none"

    def split_rows(self, x: Array) -> Array:
        """Activations [batch, …]: rows split, the rest whole."""
        if self.mesh is None:
            return x
        axes = ("batch", *["time"] * (x.ndim - 1))
        return self._placed(x, axes, gathered=None)

    def gather_matrix(
        self, x: Array, axes: Sequence[str], *, dtype: DTypeLike | None = None
    ) -> Array:
        """A matrix whole over `fsdp`, in `dtype` if given, and as it was without such an axis."""
        if not self._shared:
            return x
        if dtype is not None:  # cast where it lies: half as much is sent, and may be kept
            x = self._placed(x.astype(dtype), axes, gathered=None)
        # By name, so that the backward pass gathers again instead of keeping all that it gathered.
        return checkpoint_name(self._placed(x, axes, gathered=FSDP), _GATHERED)

    def remat_block(self, function: Callable) -> Callable:
        """`function(weights, x, …)` of one block's weights, with what is kept of it."""
        policies = jax.checkpoint_policies
        if self.remat == "block":
            return jax.checkpoint(function, prevent_cse=False)
        if self.remat == "dots":
            kept = policies.save_only_these_names(PRODUCTS)
        elif self._shared:
            kept = _all_but_gathered
        else:
            return function
        return jax.checkpoint(function, prevent_cse=False, policy=kept)

    def gather_weights(self, weights: nnx.State, *, dtype: DTypeLike) -> nnx.State:
        """One block's weights, its matrices gathered."""
        if not self._shared:
            return weights

        def of(parameter: nnx.Variable) -> nnx.Variable:
            axes = parameter.get_metadata()["axes"][1:]  # `layers` has been scanned over
            if "embed" not in axes:
                return parameter
            return parameter.replace(self.gather_matrix(parameter.get_value(), axes, dtype=dtype))

        return jax.tree.map(of, weights, is_leaf=lambda x: isinstance(x, nnx.Variable))

    @property
    def _shared(self) -> bool:
        return self.mesh is not None and self.mesh.shape.get(FSDP, 1) > 1

    def _placed(self, x: Array, axes: Sequence[str], *, gathered: str | None) -> Array:
        assert self.mesh is not None
        there = partition_spec(axes, x.shape, self.mesh, gathered=gathered)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, there))


def _all_but_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    # Nor what was gathered before it got its name: that a placement is not kept costs nothing.
    placement = primitive.name == "sharding_constraint"
    return not placement and parameters.get("name") != _GATHERED


WITHOUT_MESH = Execution()
