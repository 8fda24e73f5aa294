"""The loss from logits that the caller has computed, for a student without a separate head.

The fused head needs less memory: here all logits and their gradient exist at once. Both take the
loss and its gradient from `loss/chunk_loss.py`, chunk by chunk.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decant.models.mesh.vocabulary import Vocabulary
from decant.schemas.targets.unmatched import Partners
from decant.trainer.loss.chunk_loss import (
    HeadSums,
    LossInputs,
    Recipe,
    chunk_loss,
    chunk_loss_and_gradient,
)
from decant.trainer.loss.position_chunks import (
    cut_positions,
    flatten_rows,
    join_positions,
    positions_at_once,
)
from decant.trainer.loss.sketches import SketchTables
from decant.trainer.loss.tail_corrections import log_prior_at
from decant.trainer.loss.targets import BatchTargets


def loss_of_logits(
    logits: Float[Array, "batch position vocab"],
    targets: BatchTargets,
    *,
    temperature: Float[Array, ""] | float,
    alpha: Float[Array, ""] | float,
    prior: Float[Array, "nodes vocab"] | None = None,
    sketch: SketchTables | None = None,
    partners: Partners | None = None,
    recipe: Recipe,
) -> tuple[Float[Array, ""], HeadSums]:
    """As `distillation_loss`, differentiable in `logits`; `recipe.softcap` is not applied."""
    log_prior = None
    if recipe.tail == "prior" and prior is not None:
        log_prior = log_prior_at(prior, beta=1 / temperature)
    sketch = sketch.at(temperature) if sketch and recipe.tail == "sketch" else None
    inputs = LossInputs(jnp.float32(temperature), jnp.float32(alpha), log_prior, sketch, partners)
    return _of_logits(recipe, logits, targets, inputs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_logits(recipe, logits, targets, inputs):
    """The loss without a gradient: the primal function of the `custom_vjp`."""

    def body(totals, chunk):
        new = chunk_loss(*_tokens(chunk), recipe=recipe, inputs=inputs, vocabulary=_whole(logits))
        return jax.tree.map(jnp.add, totals, new), None

    chunks = cut_positions((logits, targets), _step(logits, recipe))
    totals, _ = jax.lax.scan(body, _nothing(), chunks)
    return totals


def _of_logits_forward(recipe, logits, targets, inputs):
    def body(totals, chunk):
        value, sums, gradient = chunk_loss_and_gradient(
            *_tokens(chunk), recipe=recipe, inputs=inputs, vocabulary=_whole(logits)
        )
        gradient = gradient.astype(logits.dtype).reshape(chunk[0].shape)
        return jax.tree.map(jnp.add, totals, (value, sums)), gradient

    chunks = cut_positions((logits, targets), _step(logits, recipe))
    totals, gradient = jax.lax.scan(body, _nothing(), chunks)
    return totals, join_positions(gradient, length=logits.shape[1])


def _of_logits_backward(_recipe, gradient, cotangents):
    scale, _sums = cotangents
    return (gradient * scale).astype(gradient.dtype), None, None


_of_logits.defvjp(_of_logits_forward, _of_logits_backward)


def _tokens(chunk: tuple[Array, BatchTargets]) -> tuple[Array, BatchTargets]:
    logits, targets = flatten_rows(chunk)
    return logits.astype(jnp.float32), targets


def _whole(logits: Array) -> Vocabulary:
    return Vocabulary(logits.shape[-1])


def _step(logits: Array, recipe: Recipe) -> int:
    rows, length, vocabulary = logits.shape
    return positions_at_once(recipe.chunk_tokens, rows=rows, length=length, vocabulary=vocabulary)


def _nothing() -> tuple[Array, HeadSums]:
    return jnp.float32(0), HeadSums.zero()
