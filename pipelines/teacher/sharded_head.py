"""The teacher's head as the devices of a mesh share it: from hidden states to logits."""

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
    """How logits are made; hashable, so that compiled programs may depend on it."""

    vocabulary: Vocabulary
    softcap: float | None = None
    """The model's, `config.final_softcap`."""
    mesh: Mesh | None = None

    @classmethod
    def of(cls, model: Decoder, *, vocabulary_size: int, mesh: Mesh) -> Head:
        """The head of a model on `mesh`, for the ids that its tokenizer has."""
        axis = TENSOR if mesh.shape[TENSOR] > 1 else None
        return cls(Vocabulary(vocabulary_size, axis), model.config.final_softcap, mesh)

    def logits(
        self, hidden: Float[Array, "tokens width"], unembedding: Float[Array, "width here"]
    ) -> Float[Array, "tokens here"]:
        """This device's, float32; −inf in columns that are no id."""
        found = logits(hidden, unembedding, softcap=self.softcap)
        return self.vocabulary.mask_padding(found)

    def unembedding(self, model: Decoder) -> Float[Array, "width columns"]:
        """The model's matrix without the rows of a padded vocabulary, which no token has and which
        must not collect mass; split over the devices, the last of which may need padding again."""
        assert self.mesh
        padding = -self.vocabulary.size % self.mesh.shape[TENSOR]

        def cut(model: Decoder) -> Array:
            return jnp.pad(model.unembedding()[:, : self.vocabulary.size], ((0, 0), (0, padding)))

        return jax.jit(cut, out_shardings=NamedSharding(self.mesh, P(None, TENSOR)))(model)

    def on_each_device(
        self, function: Callable, hidden: Array, unembedding: Array, of_rows: Array, *, out: Any
    ) -> Any:
        """`function` of a device's rows and columns: (hidden, unembedding, of_rows); `out` says
        how what it gives is split."""
        assert self.mesh
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(P(DATA), P(None, TENSOR), P(DATA)),
            out_specs=out,
            check_vma=False,  # it cannot see that gathered numbers are the same everywhere
        )(hidden, unembedding, of_rows)
