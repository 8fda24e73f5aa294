"""The fused head: from a batch's hidden states to loss and gradients, by a scan over chunks.

Each chunk computes its logits once, and from them both the loss and the gradient (`custom_vjp`);
`loss/chunk_loss.py` is the part for one chunk. At any time only one chunk's logits and one float32
gradient of the unembedding exist. All sums are float32, whatever type the model computes in.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from decant.models.numerics import contract, soft_cap_slope
from decant.models.numerics import logits as logits_of
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
from decant.trainer.loss.vocabulary_split import VocabularySplit


def distillation_loss(
    hidden: Float[Array, "batch position width"],
    unembedding: Float[Array, "width vocab"],
    targets: BatchTargets,
    *,
    temperature: Float[Array, ""] | float,
    alpha: Float[Array, ""] | float,
    prior: Float[Array, "nodes ids"] | None = None,
    sketch: SketchTables | None = None,
    partners: Partners | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008  (immutable)
    vocabulary: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], HeadSums]:
    """Σ over counted positions of α·T²·D(p ‖ q) + (1 − α)·CE, and its parts.

    The loss is differentiable in `hidden` and `unembedding`; its parts carry no gradient. The
    caller divides the sum by the counted tokens of the whole batch, so that microbatches, devices
    and packing change results by rounding only. Logits are computed in the dtype of `hidden` and
    kept in float32.

    `temperature` must be at least 1, which the caller checks. `prior` is the tail prior at the
    nodes of `BETAS` (`Cache.tail_prior`), for tail = "prior"; `sketch` is for tail = "sketch", and
    with tail = "counts" the temperature must be 1; `partners` are for divergence = "gold", whose
    factors of T `loss/sorted_probabilities.py` gives. `vocabulary` is the number of ids:
    the unembedding's first columns, as a checkpoint may pad it (None: all columns). On a `mesh`
    rows are split over `data` and `fsdp`, and the vocabulary over `tensor`.
    """
    split = VocabularySplit.of(mesh, size=vocabulary or unembedding.shape[-1])

    def columns(table: Array, *, fill: float) -> Array:
        """The table with the columns of the padded unembedding."""
        missing = unembedding.shape[-1] - table.shape[-1]
        pads = [(0, 0)] * (table.ndim - 1) + [(0, missing)]
        return split.columns(jnp.pad(table, pads, constant_values=fill), fill=fill)

    log_prior = None
    if recipe.tail == "prior" and prior is not None:
        log_prior = columns(log_prior_at(prior, beta=1 / temperature), fill=-jnp.inf)
    sketch = sketch.at(temperature) if sketch and recipe.tail == "sketch" else None
    sketch = jax.tree.map(lambda table: columns(table, fill=0.0), sketch)
    if partners is not None:
        partners = partners._replace(alone=columns(partners.alone, fill=0.0))
    inputs = LossInputs(jnp.float32(temperature), jnp.float32(alpha), log_prior, sketch, partners)
    return _fused(recipe, split, hidden, split.columns(unembedding, fill=0.0), targets, inputs)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(recipe, split, hidden, unembedding, targets, inputs):
    """The loss without gradients: the primal function of the `custom_vjp`."""
    matrix = _in_narrower(unembedding, hidden)

    def on_device(hidden, matrix, targets, inputs):
        def body(totals, chunk):
            chunk_hidden, chunk_targets = flatten_rows(chunk)
            logits = logits_of(chunk_hidden, matrix, softcap=recipe.softcap)
            new = chunk_loss(
                split.vocabulary.mask_padding(logits),
                chunk_targets,
                recipe=recipe,
                inputs=inputs,
                vocabulary=split.vocabulary,
            )
            return jax.tree.map(jnp.add, totals, new), None

        step = _chunk_length(hidden, matrix, recipe)
        totals, _ = jax.lax.scan(body, _zero_sums(), cut_positions((hidden, targets), step))
        return split.over_rows(totals)

    arrays = (hidden, matrix, targets, inputs)
    return split.run(on_device, *arrays, splits=_splits(split, inputs), out=PartitionSpec())


def _fused_forward(recipe, split, hidden, unembedding, targets, inputs):
    matrix = _in_narrower(unembedding, hidden)

    def on_device(hidden, matrix, targets, inputs):
        def body(carry, chunk):
            totals, d_matrix = carry
            chunk_hidden, chunk_targets = flatten_rows(chunk)
            logits = logits_of(chunk_hidden, matrix, softcap=recipe.softcap)
            value, sums, d_logits = chunk_loss_and_gradient(
                split.vocabulary.mask_padding(logits),
                chunk_targets,
                recipe=recipe,
                inputs=inputs,
                vocabulary=split.vocabulary,
            )
            # d_logits is with respect to capped logits; the product gave uncapped ones.
            d_logits = (d_logits * soft_cap_slope(logits, recipe.softcap)).astype(hidden.dtype)
            d_hidden = split.vocabulary.sum_over_devices(contract("cv,dv->cd", d_logits, matrix))
            if not recipe.frozen_head:
                d_matrix += contract("cd,cv->dv", chunk_hidden, d_logits)
            totals = jax.tree.map(jnp.add, totals, (value, sums))
            return (totals, d_matrix), d_hidden.astype(hidden.dtype).reshape(chunk[0].shape)

        step = _chunk_length(hidden, matrix, recipe)
        width = 0 if recipe.frozen_head else matrix.shape[1]
        start = (_zero_sums(), jnp.zeros((matrix.shape[0], width), jnp.float32))
        (totals, d_matrix), d_hidden = jax.lax.scan(
            body, start, cut_positions((hidden, targets), step)
        )
        d_hidden = join_positions(d_hidden, length=hidden.shape[1])
        return split.over_rows(totals), d_hidden, split.matrix_over_rows(d_matrix)

    totals, d_hidden, d_matrix = split.run(
        on_device,
        hidden,
        matrix,
        targets,
        inputs,
        splits=_splits(split, inputs),
        out=(PartitionSpec(), split.rows, split.matrix_gradient(matrix.shape[0])),
    )
    return totals, (d_hidden, d_matrix.astype(unembedding.dtype))


def _fused_backward(recipe, _split, gradients, cotangents):
    scale, _sums = cotangents
    d_hidden, d_matrix = ((g * scale).astype(g.dtype) for g in gradients)
    return d_hidden, None if recipe.frozen_head else d_matrix, None, None


_fused.defvjp(_fused_forward, _fused_backward)


def _in_narrower(unembedding: Array, hidden: Array) -> Array:
    """The matrix in the narrower dtype of the two.

    It is cast before the devices exchange their shares of it: bfloat16 sends half as much. A frozen
    bfloat16 matrix is widened chunk by chunk, in the product.
    """
    if unembedding.dtype.itemsize < hidden.dtype.itemsize:
        return unembedding
    return unembedding.astype(hidden.dtype)


def _splits(split: VocabularySplit, inputs: LossInputs) -> tuple:
    """PartitionSpecs of hidden states, matrix, targets and inputs."""
    everywhere = LossInputs(*[PartitionSpec()] * 2)  # type: ignore[arg-type]
    prior = None if inputs.log_prior is None else split.vocab
    sketch = jax.tree.map(lambda _: split.matrix, inputs.sketch)
    partners = inputs.partners and Partners(split.vocab, PartitionSpec())  # type: ignore[arg-type]
    tables = everywhere._replace(log_prior=prior, sketch=sketch, partners=partners)  # type: ignore[arg-type]
    return split.rows, split.matrix, split.rows, tables


def _chunk_length(
    hidden: Float[Array, "batch position width"],
    matrix: Float[Array, "width vocab"],
    recipe: Recipe,
) -> int:
    rows, length, _ = hidden.shape
    vocabulary = matrix.shape[1]
    return positions_at_once(recipe.chunk_tokens, rows=rows, length=length, vocabulary=vocabulary)


def _zero_sums() -> tuple[Float[Array, ""], HeadSums]:
    return jnp.float32(0), HeadSums.zero()
