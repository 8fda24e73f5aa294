"""The targets of a batch's positions, as arrays on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decant.schemas.records.rows import next_tokens
from decant.schemas.targets.unmatched import UNMATCHED
from decant.served_losses import Divergence
from decant.trainer.loss.batch_fields import COUNTS, DRAWS, TOPK, WRITTEN


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
    count_ids: Int[Array, "*position N"] | None = None
    """Ids drawn from the whole distribution. This and `counts` are None unless tail = "counts"."""
    counts: Int[Array, "*position N"] | None = None
    """How often each was drawn; 0 in an empty slot."""
    sketch: Float[Array, "*position r"] | None = None
    """This and `sketch_basis` are None unless tail = "sketch"."""
    sketch_basis: Int[Array, "*position"] | None = None
    """Which of the bases of `SketchTables` the sketch refers to."""
    label_logprobs: Float[Array, "*position"] | None = None
    """The teacher's log-probability of the label; −inf where unknown. This and `writer_logprobs`
    are None unless divergence = "on_policy"."""
    writer_logprobs: Float[Array, "*position"] | None = None
    """The log-probability that the label's writer gave it; NaN where no model wrote the label."""
    unmatched: Float[Array, "*position k"] | None = None
    """Log-probabilities of the teacher's tokens without a partner in the student's vocabulary, as
    `topk_logprobs`, descending. `tail_logmass` holds their mass. None: the cache was not made by
    `decant align --targets matched`."""

    @classmethod
    def of(cls, batch: Mapping[str, Array], divergence: Divergence = "forward_kl") -> BatchTargets:
        """The targets [row, position, …] that a loss with this `divergence` has in a batch."""
        labels = batch["labels"] if "labels" in batch else next_tokens(batch["tokens"], xp=jnp)
        held = (*TOPK, *DRAWS, *COUNTS, *(WRITTEN if divergence == "on_policy" else ()))
        arrays = {name: batch[name] for name in held if name in batch}
        if TOPK[0] not in arrays:
            nothing = jnp.zeros((*labels.shape, 0))
            arrays |= dict(zip(TOPK, (nothing.astype(jnp.int32), nothing, nothing), strict=True))
        if UNMATCHED in batch:
            arrays["unmatched"] = batch[UNMATCHED]
        if "sketch" in batch:
            basis = jnp.broadcast_to(batch["sketch_basis"][:, None], labels.shape)
            arrays |= {"sketch": batch["sketch"], "sketch_basis": basis}
        return cls(labels=labels, mask=batch["loss_mask"], **arrays)

    @property
    def stored(self) -> Bool[Array, "*position k"]:
        """Which of the k columns hold a target."""
        # Padding repeats id 0, but scatters promise unique ids: unscored positions store nothing.
        return jnp.isfinite(self.topk_logprobs) & self.mask[..., None]

    @property
    def taught(self) -> Bool[Array, "*position"]:
        """Which positions have a teacher's targets."""
        if self.label_logprobs is not None and self.writer_logprobs is not None:
            return self.written & jnp.isfinite(self.label_logprobs)
        taught = jnp.any(self.stored, axis=-1)
        if self.counts is not None:
            # A cache may hold counts and no top-k.
            taught |= jnp.any(self.counts > 0, axis=-1) & self.mask
        if self.unmatched is not None:
            taught |= jnp.isfinite(self.unmatched[..., 0]) & self.mask
        return taught

    @property
    def written(self) -> Bool[Array, "*position"]:
        """Which counted positions have a label that a model wrote."""
        if self.writer_logprobs is None:
            return jnp.zeros_like(self.mask)
        return jnp.isfinite(self.writer_logprobs) & self.mask

    @property
    def likeliest(self) -> Int[Array, "*position"]:
        """The teacher's likeliest token, or that with the largest count if there is no top-k; −1
        where there is no target, or where that token is not in the student's vocabulary."""
        if self.topk_ids.shape[-1]:
            ids = self.topk_ids[..., 0]
            if self.unmatched is not None:
                ids = jnp.where(self.unmatched[..., 0] > self.topk_logprobs[..., 0], -1, ids)
        elif self.count_ids is not None and self.counts is not None:
            largest = jnp.argmax(self.counts, axis=-1, keepdims=True)
            ids = jnp.take_along_axis(self.count_ids, largest, axis=-1)[..., 0]
        else:
            return jnp.full(self.mask.shape, -1)
        return jnp.where(self.taught, ids, -1)
