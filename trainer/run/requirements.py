"""What a loss needs of a cache: which arrays, and that they are there before anything starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from decant.models.mesh.sharding import everywhere
from decant.schemas import Cache
from decant.schemas.signals import scale_name
from decant.schemas.targets.prior import log_prior
from decant.trainer.config import Loss, Train
from decant.trainer.loss.divergences import Tail
from decant.trainer.loss.layer_pairs import NO_PAIRS, Pairs, pairs, with_layers
from decant.trainer.loss.layer_terms import Matrices
from decant.trainer.run.binding import with_saved_layers
from decant.trainer.run.student import shape, teacher_config

ROWS = ("tokens", "segment_ids", "positions", "loss_mask")
TOPK = ("topk_ids", "topk_logprobs", "tail_logmass")
DRAWS = ("tail_ids", "tail_logprobs", "tail_logweights")


def fields(tail: Tail) -> tuple[str, ...]:
    """What of a batch goes to the device."""
    return (*ROWS, *TOPK, *DRAWS) if tail == "sampled" else (*ROWS, *TOPK)


def arrays(signals: Sequence[str], batch: Mapping[str, np.ndarray]) -> list[str]:
    """What of a batch holds these signals, beside `fields`: their arrays and scales."""
    scales = [scale_name(signal) for signal in signals]
    return [*signals, *(scale for scale in scales if scale in batch)]


def check_cache(cache: Cache, *, loss: Loss) -> None:
    """ValueError if the cache's logits lack what the loss is made from."""
    if "logits" not in cache.manifest.signals:
        raise ValueError(
            f"{cache.path}: rows without what a teacher said of them (`pipelines tokenise`); they "
            "can be mixed in with a cache that has targets, as [[data.caches]], and nothing else"
        )
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


def tail_prior(
    cache: Cache, *, loss: Loss, mesh: Mesh, others: Sequence[Cache] = ()
) -> Float[Array, "nodes vocab"] | None:
    """The tail prior on every device, if the loss needs it: that of all parts of the caches, which
    are one teacher's, as one. ValueError if one has none."""
    if loss.tail != "prior":
        return None
    prior = log_prior([prior for some in (cache, *others) for prior in some.tail_priors()])
    return everywhere(np.asarray(prior, np.float32), mesh)


def directions(cache: Cache, *, pairs: Pairs, mesh: Mesh) -> Matrices:
    """The principal directions that pairs ask for, by signal, on every device.

    ValueError if the cache's parts disagree on those of a signal that is compared at all: states
    along different directions are not the same numbers, whatever is trained to meet them.
    """
    found = {}
    for pair in (pair for term in pairs.hidden for pair in term):
        along = cache.directions(pair.signal)
        if pair.directions:
            found[pair.signal] = everywhere(np.asarray(along, np.float32), mesh)
    return found


def settled(config: Train, *, cache: Cache) -> tuple[Train, Pairs]:
    """The settings with every layer as a number, and the pairs that they mean.

    A run that began keeps its layers: what a default means may change when a cache gains signals.
    Raises ValueError if student, teacher and cache do not fit the loss's terms.
    """
    if not config.loss.terms:
        return config, NO_PAIRS
    config = with_saved_layers(config)
    student, cut_from = shape(config.student, cache=cache, run=config.run)
    loss = with_layers(
        config.loss,
        cache=cache,
        teacher=teacher_config(cache),
        student=student,
        cut_from=cut_from,
    )
    settings = dataclasses.replace(config, loss=loss)
    return settings, pairs(loss, cache=cache, student=student)
