"""Inputs of the loss that a cache gives once a run: tail prior, directions, pairs of layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from decant.models.mesh.sharding import replicate, split_columns
from decant.schemas import Cache
from decant.schemas.reading.held import draws_of_token, held_by
from decant.schemas.targets.prior import log_prior
from decant.schemas.targets.unmatched import Partners
from decant.trainer.config import Loss, Train
from decant.trainer.data.mixture import caches_with_targets
from decant.trainer.loss.choice import choose_tail
from decant.trainer.loss.layer_pairs import NO_PAIRS, Pairs, layer_pairs, number_layers
from decant.trainer.loss.layer_terms import Matrices
from decant.trainer.loss.sketches import SketchTables, sketch_tables
from decant.trainer.run.binding import BINDING, read_run_settings, with_saved_layers
from decant.trainer.run.initial_student import initial_config, teacher_config


def tail_prior(
    cache: Cache, *, loss: Loss, mesh: Mesh, others: Sequence[Cache] = ()
) -> Float[Array, "nodes vocab"] | None:
    """The tail prior [nodes, vocab] on every device; None unless `loss.tail` is "prior".

    The priors of all parts of all caches, which must have the same teacher, are combined into one.
    Raises ValueError if a part has no prior.
    """
    if loss.tail != "prior":
        return None
    prior = log_prior([prior for each in (cache, *others) for prior in each.tail_priors()])
    return replicate(np.asarray(prior, np.float32), mesh)


def sketch_inputs(caches: Sequence[Cache], *, loss: Loss, mesh: Mesh) -> SketchTables | None:
    """The heads of all caches' sketches, on every device; None unless `loss.tail` is "sketch".

    Raises ValueError if a cache holds no sketch, or the teachers' soft caps differ.
    """
    if loss.tail != "sketch":
        return None
    tables = sketch_tables([head for cache in caches for head in cache.sketch_heads()])
    return jax.tree.map(lambda table: split_columns(table, mesh), tables)


def partners_of(caches: Sequence[Cache], *, loss: Loss, mesh: Mesh) -> Partners | None:
    """Which of the student's tokens the teacher has too, on every device; None unless
    `loss.divergence` is "gold".

    ValueError if the caches, all by `decant align --targets matched`, differ in it.
    """
    if loss.divergence != "gold":
        return None
    first, *others = [cache.partners() for cache in caches]
    for other in others:
        if other.share != first.share or not np.array_equal(other.alone, first.alone):
            raise ValueError(
                "these caches were aligned from teachers with different tokenizers, so that "
                "loss.divergence = gold has no one set of common tokens. Train from one of them"
            )
    return Partners(split_columns(first.alone, mesh), replicate(np.asarray(first.share), mesh))


def with_tail(
    config: Train, *, cache: Cache, others: Sequence[Cache] = ()
) -> tuple[Train, str | None]:
    """The settings with an explicit `loss.tail`, and a line to print about it, if any.

    An existing run keeps its tail, because a cache may gain counts or a sketch. ValueError if no
    tail that all the caches allow fits the loss.
    """
    loss = config.loss
    if (config.run / BINDING).exists():
        tail = loss.tail or read_run_settings(config.run)["loss.tail"]
        return dataclasses.replace(config, loss=dataclasses.replace(loss, tail=tail)), None
    caches = [cache, *caches_with_targets(others)]
    tokens = config.data.batch_rows * cache.manifest.sequence_length
    draws = draws_of_token(caches, tokens=tokens)
    loss, line = choose_tail(loss, held_by(caches), draws_of_token=draws)
    return dataclasses.replace(config, loss=loss), line


def principal_directions(cache: Cache, *, pairs: Pairs, mesh: Mesh) -> Matrices:
    """Principal directions on every device, by signal, for the pairs that need them.

    Raises ValueError if a cache's parts have different directions for a signal of any pair: the
    numbers stored along them would not be comparable, with or without a trained projection.
    """
    matrices = {}
    for pair in (pair for term in pairs.hidden for pair in term):
        directions = cache.directions(pair.signal)
        if pair.directions:
            matrices[pair.signal] = replicate(np.asarray(directions, np.float32), mesh)
    return matrices


def resolve_layers(config: Train, *, cache: Cache) -> tuple[Train, Pairs]:
    """The settings with an explicit number for every layer, and the pairs of layers to compare.

    An existing run keeps its layers, because defaults may change when a cache gains signals.
    Raises ValueError if the student, the teacher or the cache does not fit a term of the loss: it
    lacks a layer, or widths or heads differ.
    """
    if not config.loss.terms:
        return config, NO_PAIRS
    config = with_saved_layers(config)
    student, cut_from = initial_config(config.student, cache=cache, run=config.run)
    loss = number_layers(
        config.loss,
        cache=cache,
        teacher=teacher_config(cache),
        student=student,
        cut_from=cut_from,
    )
    settings = dataclasses.replace(config, loss=loss)
    return settings, layer_pairs(loss, cache=cache, student=student)
