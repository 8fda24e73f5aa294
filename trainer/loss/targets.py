"""The targets of a batch's positions, as arrays on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decant.schemas.records.rows import next_tokens
from decant.trainer.loss.batch_fields import DRAWS, TOPK


class BatchTargets(NamedTuple):
    """What each position is scored against. The label of position t is the token at t + 1."""

    labels: Int[Array, "*position"]
    mask: Bool[Array, "*position"]
    """Whether the position counts."""
    topk_ids: Int[Array, "*position k"]
    topk_logprobs: Float[Array, "*position k"]
    """In nats, at T = 1, over the full vocabulary; −inf where nothing is stored."""
    tail_logmass: Float[Array, "*position nodes"]
    tail_ids: Int[Array, "*position m"] | None = None
    """Tail draws, with repeats. This and the next two are None unless tail = "sampled"."""
    tail_logprobs: Float[Array, "*position m"] | None = None
    """In nats, at T = 1, over the full vocabulary; −inf where there is no draw."""
    tail_logweights: Float[Array, "*position m"] | None = None
    """−log(m·r(v)), where r is the proposal over the tail; −inf where there is no draw."""

    @classmethod
    def of(cls, batch: Mapping[str, Array]) -> BatchTargets:
        """The targets [row, position, …] of a batch."""
        return cls(
            labels=next_tokens(batch["tokens"], xp=jnp),
            mask=batch["loss_mask"],
            **{name: batch[name] for name in (*TOPK, *DRAWS) if name in batch},
        )

    @property
    def stored(self) -> Bool[Array, "*position k"]:
        """Which of the k columns hold a target."""
        # Padding repeats id 0, but scatters promise unique ids: unscored positions store nothing.
        return jnp.isfinite(self.topk_logprobs) & self.mask[..., None]
