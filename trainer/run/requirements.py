"""What a loss needs of a cache: which arrays, and that they are there before anything starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from decant.models.mesh.sharding import everywhere
from decant.schemas import Cache
from decant.schemas.targets.prior import log_prior
from decant.trainer.config import Loss, Train
from decant.trainer.loss.layer_pairs import NO_PAIRS, Pairs, pairs, with_layers
from decant.trainer.loss.layer_terms import Matrices
from decant.trainer.run.binding import with_saved_layers
from decant.trainer.run.student import shape, teacher_config


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
