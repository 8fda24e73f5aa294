"""The fused head on a mesh: each device takes its rows and its share of the vocabulary.

Devices exchange a few numbers for each token and, at the end, sums and the gradient of the
unembedding. Logits are never exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from decant.models.mesh.sharding import DATA, FSDP, TENSOR, row_axes
from decant.models.mesh.vocabulary import Vocabulary


class VocabularySplit(NamedTuple):
    """How the head's arrays are split over a mesh. Without a mesh nothing is split.

    Hashable, so that compiled programs may depend on it.
    """

    vocabulary: Vocabulary
    mesh: Mesh | None = None

    @classmethod
    def of(cls, mesh: Mesh | None, *, size: int) -> VocabularySplit:
        """The split of a vocabulary of `size` ids over the mesh's axis `tensor`."""
        if mesh is None or mesh.size == 1:
            return cls(Vocabulary(size))
        return cls(Vocabulary(size, TENSOR if mesh.shape[TENSOR] > 1 else None), mesh)

    def columns(self, x: Float[Array, "... vocab"], *, fill: float) -> Float[Array, "... columns"]:
        """`x` with the columns that the head computes with.

        If the vocabulary is split, columns are padded with `fill` to a multiple of the devices of
        `tensor`. If not, they are cut to the ids.
        """
        if self.mesh is None or self.vocabulary.axis is None:
            return x[..., : self.vocabulary.size]
        # A vocabulary padded by its checkpoint is not cut: that would move every device's columns.
        missing = -x.shape[-1] % self.mesh.shape[TENSOR]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=fill)

    def run(self, function: Callable, *arrays: Any, splits: Any, out: Any) -> Any:
        """`function` applied on each device to its share of `arrays`.

        `splits` are the PartitionSpecs of `arrays`, `out` those of the results.
        """
        if self.mesh is None:
            return function(*arrays)
        # check_vma cannot infer that sums over devices are equal on all of them.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=splits, out_specs=out, check_vma=False
        )(*arrays)

    @property
    def rows(self) -> PartitionSpec:
        """Of arrays with a row axis."""
        return PartitionSpec(row_axes(self.mesh) if self.mesh else None)

    @property
    def vocab(self) -> PartitionSpec:
        """Of arrays with one number for each column."""
        return PartitionSpec(self.vocabulary.axis)

    @property
    def matrix(self) -> PartitionSpec:
        """Of the unembedding inside `run`."""
        return PartitionSpec(None, self.vocabulary.axis)

    def matrix_gradient(self, width: int) -> PartitionSpec:
        """Of the unembedding's gradient: split over `fsdp` if that divides `width`."""
        even = self.mesh is not None and width % self.mesh.shape[FSDP] == 0
        return PartitionSpec(FSDP if even else None, self.vocabulary.axis)

    def over_rows(self, x: Any) -> Any:
        """`x` summed over the devices that hold different rows."""
        return x if self.mesh is None else lax.psum(x, row_axes(self.mesh))

    def matrix_over_rows(self, x: Float[Array, "width here"]) -> Float[Array, "share here"]:
        """`over_rows` of which each device keeps its share, as `matrix_gradient` says."""
        if self.mesh is None or self.matrix_gradient(x.shape[0])[0] is None:
            return self.over_rows(x)
        return lax.psum(lax.psum_scatter(x, FSDP, scatter_dimension=0, tiled=True), DATA)
