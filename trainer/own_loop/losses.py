"""The trainer's losses for a loop of one's own: from hidden states (fused), or from logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from decant.command_line.checks import Bounds, check_values
from decant.schemas.reading.held import held_by_batch
from decant.schemas.targets.sketch import SketchHead
from decant.schemas.targets.unmatched import UNMATCHED, Partners
from decant.served_losses import BY_RANK, Asked, Divergence, Tail
from decant.trainer.loss.batch_fields import loss_fields
from decant.trainer.loss.chunk_loss import HeadSums, Recipe
from decant.trainer.loss.fused_head import distillation_loss
from decant.trainer.loss.given_logits import loss_of_logits
from decant.trainer.loss.layer_terms import TermSums
from decant.trainer.loss.objective import Totals, means
from decant.trainer.loss.settings import SHARE, TEMPERATURE, Loss
from decant.trainer.loss.sketches import SketchTables, sketch_tables
from decant.trainer.loss.targets import BatchTargets

Scalar = Float[Array, ""] | float
Sketch = SketchTables | Sequence[SketchHead] | None
LossAndMetrics = tuple[Float[Array, ""], dict[str, Array]]


class _Given(NamedTuple):
    """Tables that the caller took from the cache."""

    prior: Float[Array, "nodes vocab"] | np.ndarray | None
    sketch: Sketch
    partners: Partners | None


def loss(
    hidden: Float[Array, "rows position width"],
    unembedding: Float[Array, "width columns"],
    batch: Mapping[str, Any],
    *,
    temperature: Scalar = Loss.temperature,
    alpha: Scalar | None = Loss.alpha,
    tail: Tail | None = Loss.tail,
    divergence: Divergence = Loss.divergence,
    mix: float = Loss.mix,
    clip: float = Loss.clip,
    anchor: float = Loss.anchor,
    prior: Float[Array, "nodes vocab"] | np.ndarray | None = None,
    sketch: Sketch = None,
    partners: Partners | None = None,
    softcap: float | None = None,
    chunk_tokens: int | None = Loss.chunk_tokens,
    has_aux: bool = False,
) -> Float[Array, ""] | LossAndMetrics:
    """α·T²·D(teacher ‖ student) + (1 − α)·cross-entropy: the mean over the batch's counted tokens.

    The student's logits are `hidden @ unembedding`. Only a chunk of them exists at once, which
    saves most of the memory of a large vocabulary. The same value as `loss_on_logits`, and as
    `decant train` with these settings, which are its defaults. A pure function, differentiable in
    `hidden` and `unembedding`.

    ```python
    def objective(params, batch):
        hidden = student(params, batch["tokens"], batch["segment_ids"], batch["positions"])
        return decant.loss(hidden, params["unembedding"], batch)

    gradient = jax.grad(objective)(params, batch)
    ```

    Args:
        hidden: the student's last hidden states, the input of its unembedding.
        unembedding: its output matrix; columns after the tokenizer's ids get no probability.
        batch: from `decant.batches`, or arrays of `Cache.read`.
        temperature: T ≥ 1 of both distributions, `loss.temperature`.
        alpha: α in [0, 1], the teacher's share, `loss.alpha`. None: 0.9, or 1 for on_policy.
        tail: how the vocabulary outside the stored top-k is represented, `loss.tail`. None: at
            T = 1 the best that the batch holds; at another T sketches, else what `prior` or draws
            allow.
        divergence: D, `loss.divergence`. `on_policy` reads label_logprobs and writer_logprobs.
        mix: for `divergence="jsd"` and `"gold"`, `loss.mix`.
        clip, anchor: for `divergence="on_policy"`, `loss.clip` and `loss.anchor`.
        prior: `cache.tail_prior()`, float32 [7, vocabulary]; only for `tail="prior"`.
        sketch: `cache.sketch_heads()`; for a large one pass `jit` an argument made by
            `decant.trainer.loss.sketches.sketch_tables`; for `tail="sketch"`.
        partners: `cache.partners()`, of a cache by `decant align --targets matched`; for
            `divergence="gold"`.
        softcap: the student's logits are softcap·tanh(logits/softcap), as in Gemma 2.
        chunk_tokens: tokens whose logits exist at once, `loss.chunk_tokens`.
        has_aux: return (loss, metrics) instead, for `jax.value_and_grad(…, has_aux=True)`. The
            metrics are named as in `metrics.jsonl`: kl_loss (at T), ce_loss, agreement, tokens;
            for on_policy advantage, ratio and clipped in place of kl_loss and agreement.

    ValueError if the batch, the settings and the shapes do not fit each other. A T that is traced
    by JAX cannot be checked: for `tail="sampled"` it must not exceed `batch.highest_temperature`.
    Losses that serve T = 1 only refuse it.
    """
    vocabulary = _check_batch(batch, hidden, columns=unembedding.shape[-1])
    given = _Given(prior, sketch, partners)
    tail = tail or _best_tail(batch, temperature, divergence, given)
    recipe = Recipe(divergence, mix, tail, chunk_tokens, softcap, clip=clip, anchor=anchor)
    alpha = Loss(divergence=divergence).first_alpha if alpha is None else alpha
    tables = _checked_tables(batch, recipe, temperature, alpha, given, vocabulary=vocabulary)

    def sums(targets: BatchTargets, **inputs: Any) -> tuple[Array, HeadSums]:
        return distillation_loss(hidden, unembedding, targets, vocabulary=vocabulary, **inputs)

    return _mean(sums, batch, recipe, temperature, alpha, tables, has_aux=has_aux)


def loss_on_logits(
    logits: Float[Array, "rows position columns"],
    batch: Mapping[str, Any],
    *,
    temperature: Scalar = Loss.temperature,
    alpha: Scalar | None = Loss.alpha,
    tail: Tail | None = Loss.tail,
    divergence: Divergence = Loss.divergence,
    mix: float = Loss.mix,
    clip: float = Loss.clip,
    anchor: float = Loss.anchor,
    prior: Float[Array, "nodes vocab"] | np.ndarray | None = None,
    sketch: Sketch = None,
    partners: Partners | None = None,
    chunk_tokens: int | None = Loss.chunk_tokens,
    has_aux: bool = False,
) -> Float[Array, ""] | LossAndMetrics:
    """As `loss`, from the student's logits: differentiable in `logits`.

    The logits of position t score the token at t + 1, as a model returns them: `batch["labels"]`
    are shifted already. All logits and their gradient exist at once; `loss` needs less memory.
    """
    vocabulary = _check_batch(batch, logits, columns=logits.shape[-1])
    given = _Given(prior, sketch, partners)
    tail = tail or _best_tail(batch, temperature, divergence, given)
    recipe = Recipe(divergence, mix, tail, chunk_tokens, clip=clip, anchor=anchor)
    alpha = Loss(divergence=divergence).first_alpha if alpha is None else alpha
    tables = _checked_tables(batch, recipe, temperature, alpha, given, vocabulary=vocabulary)

    def sums(targets: BatchTargets, **inputs: Any) -> tuple[Array, HeadSums]:
        return loss_of_logits(logits[..., :vocabulary], targets, **inputs)

    return _mean(sums, batch, recipe, temperature, alpha, tables, has_aux=has_aux)


def _mean(
    sums: Callable[..., tuple[Array, HeadSums]],
    batch: Mapping[str, Any],
    recipe: Recipe,
    temperature: Scalar,
    alpha: Scalar,
    tables: dict[str, Any],
    *,
    has_aux: bool,
) -> Array | LossAndMetrics:
    value, head = sums(
        _targets(batch, recipe),
        temperature=temperature,
        alpha=alpha,
        recipe=recipe,
        **tables,
    )
    value = value / jnp.maximum(head.count, 1)
    if not has_aux:
        return value
    return value, means(Totals(head, TermSums()), recipe.divergence)


def _targets(batch: Mapping[str, Any], recipe: Recipe) -> BatchTargets:
    read = (*loss_fields(recipe.tail, recipe.divergence), UNMATCHED)
    names = [name for name in ("labels", *read) if name in batch]
    arrays = {name: jnp.asarray(batch[name]) for name in names}
    return BatchTargets.of(arrays, recipe.divergence)


def _best_tail(
    batch: Mapping[str, Any], temperature: Scalar, divergence: Divergence, given: _Given
) -> Tail | None:
    """The trainer's choice, of what the caller gave; None for on_policy.

    ValueError if something has to be given.
    """
    asked, held = _asked(divergence, None, temperature), held_by_batch(batch)
    if divergence == "on_policy" or (divergence in BY_RANK and held.k):
        return asked.best_tail(held)
    if given.prior is not None:
        return "prior"
    if held.sketch and given.sketch is None:
        held = dataclasses.replace(held, sketch=False)
        if asked.best_tail(held) != "counts":
            raise ValueError(
                "this batch has sketches, which teach best here: give sketch=cache.sketch_heads(), "
                'or choose another tail, such as tail="bucket"'
            )
    return asked.best_tail(held)


def _asked(divergence: Divergence, tail: Tail | None, temperature: Scalar) -> Asked:
    known = float(temperature) if _is_known(temperature) else None
    return Asked(divergence, tail, (known,))


def _check_batch(batch: Mapping[str, Any], student: Array, *, columns: int) -> int:
    """The number of token ids; ValueError if the student's array does not fit the batch."""
    shape = batch["tokens"].shape
    if student.ndim != 3 or student.shape[:2] != shape:
        raise ValueError(
            f"the student's array has shape {student.shape}; expected [rows, positions, …] for "
            f"tokens of shape {shape}. The labels are shifted already: leave out no position"
        )
    vocabulary = getattr(batch, "vocabulary", columns)
    if columns < vocabulary:
        raise ValueError(
            f"the student has {columns} logits a position, but the cache's tokenizer has "
            f"{vocabulary} ids; give its unembedding at least {vocabulary} columns"
        )
    return vocabulary


def _checked_tables(
    batch: Mapping[str, Any],
    recipe: Recipe,
    temperature: Scalar,
    alpha: Scalar,
    given: _Given,
    *,
    vocabulary: int,
) -> dict[str, Any]:
    """The tables that the recipe needs. ValueError for settings that contradict each other, or
    that neither batch nor tables serve."""
    named = ("mix", "clip", "anchor", "chunk_tokens")
    check_values(Loss(**{name: getattr(recipe, name) for name in named}))
    for name, choice, choices in (
        ("divergence", recipe.divergence, get_args(Divergence)),
        ("tail", recipe.tail, (None, *get_args(Tail))),
    ):
        if choice not in choices:
            expected = ", ".join(filter(None, choices))
            raise ValueError(f"{name} is {choice!r}; expected one of {expected}")
    _check_number("temperature", temperature, TEMPERATURE)
    _check_number("alpha", alpha, SHARE)
    asked = _asked(recipe.divergence, recipe.tail, temperature)
    asked.require_consistent()
    asked.require_held(held_by_batch(batch), where="this batch")
    if (recipe.tail == "prior") != (given.prior is not None):
        raise ValueError(
            'tail="prior" needs prior=cache.tail_prior(), and no other tail takes a prior'
        )
    if recipe.tail == "sketch" and given.sketch is None:
        raise ValueError('tail="sketch" needs sketch=cache.sketch_heads()')
    if recipe.divergence == "gold" and given.partners is None:
        raise ValueError('divergence="gold" needs partners=cache.partners()')
    sketch = given.sketch
    tables = sketch if isinstance(sketch, SketchTables | None) else sketch_tables(sketch)
    partners = given.partners
    widths = {
        "prior": given.prior,
        "sketch": None if tables is None else tables.bias,
        "partners": None if partners is None else partners.alone,
    }
    for name, table in widths.items():
        if table is not None and table.shape[-1] != vocabulary:
            raise ValueError(
                f"{name} has {table.shape[-1]} columns, but the cache's tokenizer has {vocabulary} "
                "ids; take it from the cache that the batches come from"
            )
    needed = {
        "prior": given.prior,
        "sketch": tables if recipe.tail == "sketch" else None,
        "partners": partners if recipe.divergence == "gold" else None,
    }
    return jax.tree.map(lambda table: jnp.asarray(table, jnp.float32), needed)


def _check_number(name: str, value: Scalar, bounds: Bounds) -> None:
    if _is_known(value) and float(value) not in bounds:
        raise ValueError(f"{name} is {value}; expected a number, {bounds}")


def _is_known(value: Any) -> bool:
    """Whether the number is known now. Reading a JAX array would wait for the device."""
    return isinstance(value, int | float | np.number)
