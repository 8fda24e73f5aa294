"""The trainer's losses for a loop of one's own: from hidden states (fused), or from logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from decant.command_line.checks import Bounds, check_values
from decant.schemas.targets.sketch import SketchHead
from decant.schemas.targets.unmatched import UNMATCHED
from decant.trainer.loss.batch_fields import DRAWS, WRITTEN, loss_fields
from decant.trainer.loss.choice import ADD_COUNTS, Held, choose_tail
from decant.trainer.loss.chunk_loss import HeadSums, Recipe
from decant.trainer.loss.fused_head import distillation_loss
from decant.trainer.loss.given_logits import loss_of_logits
from decant.trainer.loss.layer_terms import TermSums
from decant.trainer.loss.objective import Totals, means
from decant.trainer.loss.settings import BY_RANK, SHARE, TEMPERATURE, Divergence, Loss, Tail
from decant.trainer.loss.sketches import SketchTables, sketch_tables
from decant.trainer.loss.targets import BatchTargets

Scalar = Float[Array, ""] | float
Sketch = SketchTables | Sequence[SketchHead] | None
LossAndMetrics = tuple[Float[Array, ""], dict[str, Array]]


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
        mix: for `divergence="jsd"`, `loss.mix`.
        clip, anchor: for `divergence="on_policy"`, `loss.clip` and `loss.anchor`.
        prior: `cache.tail_prior()`, float32 [7, vocabulary]; only for `tail="prior"`.
        sketch: `cache.sketch_heads()`; for a large one pass `jit` an argument made by
            `decant.trainer.loss.sketches.sketch_tables`; for `tail="sketch"`.
        softcap: the student's logits are softcap·tanh(logits/softcap), as in Gemma 2.
        chunk_tokens: tokens whose logits exist at once, `loss.chunk_tokens`.
        has_aux: return (loss, metrics) instead, for `jax.value_and_grad(…, has_aux=True)`. The
            metrics are named as in `metrics.jsonl`: kl_loss (at T), ce_loss, agreement, tokens;
            for on_policy advantage, ratio and clipped in place of kl_loss and agreement.

    ValueError if the batch, the settings and the shapes do not fit each other. A T that is traced
    by JAX cannot be checked: for `tail="sampled"` it must not exceed `batch.highest_temperature`.
    """
    vocabulary = _check_batch(batch, hidden, columns=unembedding.shape[-1])
    tail = tail or _best_tail(batch, temperature, divergence, prior=prior, sketch=sketch)
    recipe = Recipe(divergence, mix, tail, chunk_tokens, softcap, clip=clip, anchor=anchor)
    alpha = Loss(divergence=divergence).first_alpha if alpha is None else alpha
    tables = _checked_tables(
        batch, recipe, temperature, alpha, prior=prior, sketch=sketch, vocabulary=vocabulary
    )

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
    chunk_tokens: int | None = Loss.chunk_tokens,
    has_aux: bool = False,
) -> Float[Array, ""] | LossAndMetrics:
    """As `loss`, from the student's logits: differentiable in `logits`.

    The logits of position t score the token at t + 1, as a model returns them: `batch["labels"]`
    are shifted already. All logits and their gradient exist at once; `loss` needs less memory.
    """
    vocabulary = _check_batch(batch, logits, columns=logits.shape[-1])
    tail = tail or _best_tail(batch, temperature, divergence, prior=prior, sketch=sketch)
    recipe = Recipe(divergence, mix, tail, chunk_tokens, clip=clip, anchor=anchor)
    alpha = Loss(divergence=divergence).first_alpha if alpha is None else alpha
    tables = _checked_tables(
        batch, recipe, temperature, alpha, prior=prior, sketch=sketch, vocabulary=vocabulary
    )

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
    batch: Mapping[str, Any],
    temperature: Scalar,
    divergence: Divergence,
    *,
    prior: Any,
    sketch: Sketch,
) -> Tail | None:
    """The trainer's choice, of what the caller gave; None for on_policy.

    ValueError if something has to be given.
    """
    if divergence == "on_policy":
        return None
    if divergence in BY_RANK and batch["topk_ids"].shape[-1]:
        return "bucket"
    known = float(temperature) if _is_known(temperature) else None
    highest = getattr(batch, "highest_temperature", None)
    counts = "counts" in batch and known == 1 and divergence == "forward_kl"
    if "sketch" in batch and sketch is None and prior is None and not counts:
        raise ValueError(
            "this batch has sketches, which teach best here: give sketch=cache.sketch_heads(), "
            'or choose another tail, such as tail="bucket"'
        )
    if prior is not None:
        return "prior"
    # A T that JAX traces is taken as one that the draws allow, as in `_check_draws`.
    drawn = DRAWS[0] in batch and not (known and highest and known > highest + 1e-6)
    held = Held(
        k=batch["topk_ids"].shape[-1],
        counts=counts,
        sketch=sketch is not None,
        drawn_at=(known or 1.0) if drawn else None,
    )
    # Counts serve T = 1 only, so a T that is not known stands for a higher one.
    asked = 1.0 if counts or known is None else known
    chosen, _ = choose_tail(Loss(temperature=asked, divergence=divergence), held)
    assert chosen.tail is not None
    return chosen.tail


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
    *,
    prior: Array | np.ndarray | None,
    sketch: Sketch,
    vocabulary: int,
) -> dict[str, Any]:
    """The tables of the recipe's tail. ValueError for settings that contradict each other or lack
    an array."""
    named = ("divergence", "mix", "tail", "clip", "anchor")
    check_values(Loss(**{name: getattr(recipe, name) for name in named}))
    if recipe.divergence == "gold":
        raise ValueError(
            'divergence="gold" needs the partners of a cache by `decant align`, which only '
            '`decant train` reads. Use divergence="uld", or loss.divergence = gold there'
        )
    _check_number("temperature", temperature, TEMPERATURE)
    _check_number("alpha", alpha, SHARE)
    if recipe.divergence == "on_policy":
        _check_written(batch, temperature)
    if recipe.tail == "sampled":
        _check_draws(batch, temperature)
    if recipe.tail == "counts":
        _check_counts(batch, temperature)
    if (recipe.tail == "prior") != (prior is not None):
        raise ValueError(
            'tail="prior" needs prior=cache.tail_prior(), and no other tail takes a prior'
        )
    if recipe.tail == "sketch" and (sketch is None or "sketch" not in batch):
        raise ValueError(
            'tail="sketch" needs sketch=cache.sketch_heads(), and batches of a cache with sketches'
        )
    tables = sketch if isinstance(sketch, SketchTables | None) else sketch_tables(sketch)
    widths = {"prior": prior, "sketch": None if tables is None else tables.bias}
    for name, table in widths.items():
        if table is not None and table.shape[-1] != vocabulary:
            raise ValueError(
                f"{name} has {table.shape[-1]} columns, but the cache's tokenizer has {vocabulary} "
                "ids; take it from the cache that the batches come from"
            )
    given = {"prior": prior, "sketch": tables if recipe.tail == "sketch" else None}
    return jax.tree.map(lambda table: jnp.asarray(table, jnp.float32), given)


def _check_written(batch: Mapping[str, Any], temperature: Scalar) -> None:
    if missing := [name for name in WRITTEN if name not in batch]:
        raise ValueError(
            f'this batch has no {missing[0]}, which divergence="on_policy" learns from. Its cache '
            "must be a capture of rollouts (docs/on-policy.md)"
        )
    if not _is_known(temperature) or float(temperature) != 1:
        raise ValueError(
            f'temperature is {temperature} with divergence="on_policy": the log-probabilities of '
            "teacher and writer are those at T = 1. Use temperature=1.0"
        )


def _check_counts(batch: Mapping[str, Any], temperature: Scalar) -> None:
    if "counts" not in batch:
        raise ValueError(
            'this batch has no counts, which tail="counts" learns from. Leave tail out for the '
            f"best that it holds, or {ADD_COUNTS}"
        )
    if not _is_known(temperature) or float(temperature) != 1:
        raise ValueError(
            f'temperature is {temperature} with tail="counts": counts are drawn at T = 1 and say '
            'nothing about another T. Use temperature=1.0, or tail="sketch"'
        )


def _check_draws(batch: Mapping[str, Any], temperature: Scalar) -> None:
    if missing := [name for name in DRAWS if name not in batch]:
        raise ValueError(
            f'this batch has no {missing[0]}, which tail="sampled" learns from: its cache was '
            "captured without draws from the tail. Leave tail out for the best that it holds, or "
            "capture with --signals.logits.draws 16"
        )
    highest = getattr(batch, "highest_temperature", None)
    if highest and _is_known(temperature) and float(temperature) > highest + 1e-6:
        raise ValueError(
            f"temperature is {float(temperature):.4g}, but the cache's tails were drawn from at T "
            f"up to {highest:.4g}; above it a few draws would weigh more than all others. Use "
            'tail="bucket" or tail="prior", or capture with --signals.logits.draws 16 '
            f"--signals.logits.draw-temperatures 1 {float(temperature):.4g}"
        )


def _check_number(name: str, value: Scalar, bounds: Bounds) -> None:
    if _is_known(value) and float(value) not in bounds:
        raise ValueError(f"{name} is {value}; expected a number, {bounds}")


def _is_known(value: Any) -> bool:
    """Whether the number is known now. Reading a JAX array would wait for the device."""
    return isinstance(value, int | float | np.number)
