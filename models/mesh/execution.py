"""How a forward pass runs: on which mesh, and what it keeps for the backward pass.

Results change by rounding only. Over `fsdp`, each block gathers its matrices where it uses them, in
the dtype of the products, and the backward pass gathers them again. So a device never holds more
than its share of the model and one block.
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
"""Checkpoint name of the arrays that `remat = "dots"` keeps: a block's queries, keys and values,
and the gated MLP's gate and up."""
_GATHERED = "gathered weights"


class Execution(NamedTuple):
    """How to run a forward pass; hashable, so it may be a static argument of jitted functions."""

    mesh: Mesh | None = None
    """None: arrays stay where they are."""
    remat: Remat = "none"
    """What the backward pass computes again: "none" keeps everything, "block" keeps each block's
    input, "dots" keeps a block's `PRODUCTS` as well."""

    def split_rows(self, x: Array) -> Array:
        """Activations [batch, …] with their rows split over the mesh and other axes whole."""
        if self.mesh is None:
            return x
        axes = ("batch", *["time"] * (x.ndim - 1))
        return self._place(x, axes, gathered=None)

    def gather_matrix(
        self, x: Array, axes: Sequence[str], *, dtype: DTypeLike | None = None
    ) -> Array:
        """The matrix gathered over `fsdp`; unchanged if the mesh has no such axis.

        `axes` are the matrix's logical axes; `dtype` is the dtype to gather it in.
        """
        if not self._has_fsdp:
            return x
        if dtype is not None:  # cast before gathering: half as much is sent, and may be kept
            x = self._place(x.astype(dtype), axes, gathered=None)
        # The name makes the backward pass gather again, instead of keeping every gathered matrix.
        return checkpoint_name(self._place(x, axes, gathered=FSDP), _GATHERED)

    def remat_block(self, function: Callable) -> Callable:
        """`function(weights, x, …)` of one block; its backward pass keeps what `remat` says."""
        policies = jax.checkpoint_policies
        if self.remat == "block":
            return jax.checkpoint(function, prevent_cse=False)
        if self.remat == "dots":
            policy = policies.save_only_these_names(PRODUCTS)
        elif self._has_fsdp:
            policy = _keep_all_but_gathered
        else:
            return function
        return jax.checkpoint(function, prevent_cse=False, policy=policy)

    def gather_weights(self, weights: nnx.State, *, dtype: DTypeLike) -> nnx.State:
        """One block's weights with its matrices gathered over `fsdp` in `dtype`."""
        if not self._has_fsdp:
            return weights

        def gather(parameter: nnx.Variable) -> nnx.Variable:
            axes = parameter.get_metadata()["axes"][1:]  # `layers` has been scanned over
            if not {"embed", "latent"} & {*axes}:
                return parameter
            return parameter.replace(self.gather_matrix(parameter.get_value(), axes, dtype=dtype))

        return jax.tree.map(gather, weights, is_leaf=lambda x: isinstance(x, nnx.Variable))

    @property
    def _has_fsdp(self) -> bool:
        return self.mesh is not None and self.mesh.shape.get(FSDP, 1) > 1

    def _place(self, x: Array, axes: Sequence[str], *, gathered: str | None) -> Array:
        assert self.mesh is not None
        spec = partition_spec(axes, x.shape, self.mesh, gathered=gathered)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def _keep_all_but_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    # The gathered array exists under the placement, too, before it gets its name. Not keeping the
    # result of other placements costs nothing.
    placement = primitive.name == "sharding_constraint"
    return not placement and parameters.get("name") != _GATHERED


WITHOUT_MESH = Execution()
