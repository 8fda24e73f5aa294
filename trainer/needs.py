"""What a loss needs of a cache: which arrays, and that they are there before anything starts."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from schemas import Cache
from trainer.config import Loss
from trainer.losses import Tail

ROWS = ("tokens", "segment_ids", "positions", "loss_mask")
TOPK = ("topk_ids", "topk_logprobs", "tail_logmass")
DRAWS = ("tail_ids", "tail_logprobs", "tail_logweights")


def fields(tail: Tail) -> tuple[str, ...]:
    """What of a batch goes to the device."""
    return (*ROWS, *TOPK, *DRAWS) if tail == "sampled" else (*ROWS, *TOPK)


def check_cache(cache: Cache, *, loss: Loss) -> None:
    """ValueError if the cache lacks what the loss is made from."""
    logits = cache.manifest.logits
    if loss.tail != "sampled":
        return
    if not logits.draws:
        raise ValueError(
            f"{cache.path}: captured without draws from the tail, which loss.tail = sampled learns "
            "from. Use --loss.tail prior or bucket, or capture with --signals.logits.draws 16"
        )
    highest = max(loss.schedules["temperature"].ends)
    drawn = 1 / min(logits.draw_betas)
    if highest > drawn + 1e-6:
        raise ValueError(
            f"{cache.path}: its tails were drawn from at T up to {drawn:.4g}, but "
            f"loss.temperature goes up to {highest:.4g}, where a few draws would weigh more than "
            "all others. Use --loss.tail prior or bucket, or capture with "
            f"--signals.logits.draw-temperatures 1 {highest:.4g}"
        )


def tail_prior(cache: Cache, *, loss: Loss, mesh: Mesh) -> Float[Array, "nodes vocab"] | None:
    """The tail prior on every device, if the loss needs it. ValueError if the cache has none."""
    if loss.tail != "prior":
        return None
    prior = cache.tail_prior()
    return jax.device_put(np.asarray(prior, np.float32), NamedSharding(mesh, PartitionSpec()))
