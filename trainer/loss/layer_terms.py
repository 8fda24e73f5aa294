"""The terms of the loss that compare the student's layers with the teacher's stored ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decant.models import Decoder
from decant.schemas.signals import scale_name
from decant.schemas.targets.attention import decode_log
from decant.schemas.targets.hidden import decode_int8
from decant.trainer.loss.attention_maps import attention_loss
from decant.trainer.loss.hidden_states import hidden_loss
from decant.trainer.loss.layer_pairs import AttentionPair, HiddenPair, Pairs
from decant.trainer.loss.settings import AttentionLoss, HiddenLoss, Loss

Matrices = Mapping[str, Float[Array, "width stored"]]
"""Matrices that map the student's states: projections by name, directions by signal."""


class TermSums(NamedTuple):
    """For each term the mean over its layers, summed over counted positions, without λ."""

    hidden: tuple[Float[Array, ""], ...] = ()
    attention: tuple[Float[Array, ""], ...] = ()


def term_sums(
    model: Decoder,
    states: Mapping[int, Float[Array, "batch position width"]],
    batch: Mapping[str, Array],
    *,
    loss: Loss,
    pairs: Pairs,
    matrices: Matrices,
    per_pair: Float[Array, ""] | None,
) -> TermSums:
    """The sums of every term of `loss`.

    `states` are the student's hidden states by layer, for all of `pairs.hidden_layers`. `batch`
    holds the signals of `pairs` as stored, undecoded. `per_pair` is the factor of terms with
    scale = "pairs", see `batch_sums`.
    """
    return TermSums(
        hidden=tuple(
            _mean([_hidden(pair, term, states, batch, matrices) for pair in chosen])
            for term, chosen in zip(loss.hidden, pairs.hidden, strict=True)
        ),
        attention=tuple(
            _mean([_attention(pair, term, model, states, batch, per_pair) for pair in chosen])
            for term, chosen in zip(loss.attention, pairs.attention, strict=True)
        ),
    )


def _hidden(
    pair: HiddenPair, term: HiddenLoss, states: Mapping, batch: Mapping, matrices: Matrices
) -> Float[Array, ""]:
    stored, scale = batch[pair.signal], batch.get(scale_name(pair.signal))
    matrix = pair.signal if pair.directions else pair.projection
    return hidden_loss(
        states[pair.student],
        stored if scale is None else decode_int8(stored, scale, xp=jnp),
        batch["loss_mask"],
        kind=term.kind,
        scale=term.scale,
        matrix=None if matrix is None else matrices[matrix],
    )


def _attention(
    pair: AttentionPair,
    term: AttentionLoss,
    model: Decoder,
    states: Mapping,
    batch: Mapping,
    per_pair: Float[Array, ""] | None,
) -> Float[Array, ""]:
    # The backward pass computes maps again: kept, they are several arrays of T² numbers a head.
    @jax.checkpoint
    def compare(inputs: Array, stored: Array) -> Float[Array, ""]:
        maps = model.attention_maps(
            inputs, batch["segment_ids"], batch["positions"], layer=pair.student, heads=pair.heads
        )
        return attention_loss(
            maps,
            decode_log(stored, xp=jnp) if stored.dtype == jnp.uint8 else stored,
            batch["segment_ids"],
            batch["loss_mask"],
            kind=term.kind,
            normalize=term.normalize,
            average_heads=term.average_heads,
            scale=term.scale,
        )

    value = compare(states[pair.student], batch[pair.signal])
    return value if term.scale == "mean" or per_pair is None else value * per_pair


def _mean(values: list[Float[Array, ""]]) -> Float[Array, ""]:
    return jnp.mean(jnp.stack(values))
