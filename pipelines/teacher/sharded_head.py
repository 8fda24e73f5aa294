"""The teacher's head on a mesh: each device computes logits for its part of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from decant.models import Decoder
from decant.models.mesh.sharding import DATA, TENSOR
from decant.models.mesh.vocabulary import Vocabulary
from decant.models.numerics import logits


class Head(NamedTuple):
    """The static properties of the head; hashable, so that it can be a static argument of jit."""

    vocabulary: Vocabulary
    softcap: float | None = None
    """`config.final_softcap` of the model."""
    mesh: Mesh | None = None

    @classmethod
    def of(cls, model: Decoder, *, vocabulary_size: int, mesh: Mesh) -> Head:
        """The head of `model` on `mesh`; `vocabulary_size` is without padding ids."""
        axis = TENSOR if mesh.shape[TENSOR] > 1 else None
        return cls(Vocabulary(vocabulary_size, axis), model.config.final_softcap, mesh)

    def logits(
        self, hidden: Float[Array, "tokens width"], unembedding: Float[Array, "width here"]
    ) -> Float[Array, "tokens here"]:
        """Logits of this device's columns, float32; −inf in columns that are no id."""
        return self.vocabulary.mask_padding(logits(hidden, unembedding, softcap=self.softcap))

    def unembedding(self, model: Decoder) -> Float[Array, "width columns"]:
        """The model's unembedding matrix without the columns of a padded vocabulary.

        No token has these ids, so they must get no probability. The matrix is split over the
        devices; zero columns are added at the end so that all have equally many.
        """
        assert self.mesh
        padding = -self.vocabulary.size % self.mesh.shape[TENSOR]

        def cut(model: Decoder) -> Array:
            return jnp.pad(model.unembedding()[:, : self.vocabulary.size], ((0, 0), (0, padding)))

        return jax.jit(cut, out_shardings=NamedSharding(self.mesh, P(None, TENSOR)))(model)

    def on_each_device(
        self, function: Callable, hidden: Array, unembedding: Array, of_rows: Any, *, out: Any
    ) -> Any:
        """Call `function(hidden, unembedding, of_rows)` on each device, with the device's shards.

        `hidden` and `of_rows`, an array or a tree of them, are split by rows, `unembedding` by
        columns. `out` is the PartitionSpec of the results.
        """
        assert self.mesh
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(P(DATA), P(None, TENSOR), P(DATA)),
            out_specs=out,
            check_vma=False,  # it cannot infer that gathered arrays are replicated
        )(hidden, unembedding, of_rows)
