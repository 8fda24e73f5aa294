"""The trainer's losses for a loop of one's own: from hidden states (fused), or from logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from decant.command_line.checks import Bounds, check_values
from decant.schemas.records.rows import next_tokens
from decant.trainer.loss.batch_fields import DRAWS, TOPK
from decant.trainer.loss.chunk_loss import HeadSums, Recipe
from decant.trainer.loss.fused_head import distillation_loss
from decant.trainer.loss.given_logits import loss_of_logits
from decant.trainer.loss.layer_terms import TermSums
from decant.trainer.loss.objective import Totals, means
from decant.trainer.loss.settings import SHARE, TEMPERATURE, Divergence, Loss, Tail
from decant.trainer.loss.targets import BatchTargets

Scalar = Float[Array, ""] | float
LossAndMetrics = tuple[Float[Array, ""], dict[str, Array]]


def loss(
    hidden: Float[Array, "rows position width"],
    unembedding: Float[Array, "width columns"],
    batch: Mapping[str, Any],
    *,
    temperature: Scalar = Loss.temperature,
    alpha: Scalar = Loss.alpha,
    tail: Tail = Loss.tail,
    divergence: Divergence = Loss.divergence,
    mix: float = Loss.mix,
    prior: Float[Array, "nodes vocab"] | np.ndarray | None = None,
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
        alpha: α in [0, 1], the teacher's share, `loss.alpha`.
        tail: how the vocabulary outside the stored top-k is represented, `loss.tail`.
        divergence: D, `loss.divergence`.
        mix: for `divergence="jsd"`, `loss.mix`.
        prior: `cache.tail_prior()`, float32 [7, vocabulary]; only for `tail="prior"`.
        softcap: the student's logits are softcap·tanh(logits/softcap), as in Gemma 2.
        chunk_tokens: tokens whose logits exist at once, `loss.chunk_tokens`.
        has_aux: return (loss, metrics) instead, for `jax.value_and_grad(…, has_aux=True)`. The
            metrics are named as in `metrics.jsonl`: kl_loss (at T), ce_loss, agreement, tokens.

    ValueError if the batch, the settings and the shapes do not fit each other. A T that is traced
    by JAX cannot be checked: for `tail="sampled"` it must not exceed `batch.highest_temperature`.
    """
    vocabulary = _check_batch(batch, hidden, columns=unembedding.shape[-1])
    recipe = Recipe(divergence, mix, tail, chunk_tokens, softcap)
    _check_settings(batch, recipe, temperature, alpha, prior=prior, vocabulary=vocabulary)

    def sums(targets: BatchTargets, **inputs: Any) -> tuple[Array, HeadSums]:
        return distillation_loss(hidden, unembedding, targets, vocabulary=vocabulary, **inputs)

    return _mean(sums, batch, recipe, temperature, alpha, prior=prior, has_aux=has_aux)


def loss_on_logits(
    logits: Float[Array, "rows position columns"],
    batch: Mapping[str, Any],
    *,
    temperature: Scalar = Loss.temperature,
    alpha: Scalar = Loss.alpha,
    tail: Tail = Loss.tail,
    divergence: Divergence = Loss.divergence,
    mix: float = Loss.mix,
    prior: Float[Array, "nodes vocab"] | np.ndarray | None = None,
    chunk_tokens: int | None = Loss.chunk_tokens,
    has_aux: bool = False,
) -> Float[Array, ""] | LossAndMetrics:
    """As `loss`, from the student's logits: differentiable in `logits`.

    The logits of position t score the token at t + 1, as a model returns them: `batch["labels"]`
    are shifted already. All logits and their gradient exist at once; `loss` needs less memory.
    """
    vocabulary = _check_batch(batch, logits, columns=logits.shape[-1])
    recipe = Recipe(divergence, mix, tail, chunk_tokens)
    _check_settings(batch, recipe, temperature, alpha, prior=prior, vocabulary=vocabulary)

    def sums(targets: BatchTargets, **inputs: Any) -> tuple[Array, HeadSums]:
        return loss_of_logits(logits[..., :vocabulary], targets, **inputs)

    return _mean(sums, batch, recipe, temperature, alpha, prior=prior, has_aux=has_aux)


def _mean(
    sums: Callable[..., tuple[Array, HeadSums]],
    batch: Mapping[str, Any],
    recipe: Recipe,
    temperature: Scalar,
    alpha: Scalar,
    *,
    prior: Array | np.ndarray | None,
    has_aux: bool,
) -> Array | LossAndMetrics:
    value, head = sums(
        _targets(batch, tail=recipe.tail),
        temperature=temperature,
        alpha=alpha,
        prior=None if prior is None else jnp.asarray(prior, jnp.float32),
        recipe=recipe,
    )
    value = value / jnp.maximum(head.count, 1)
    return (value, means(Totals(head, TermSums()))) if has_aux else value


def _targets(batch: Mapping[str, Any], *, tail: Tail) -> BatchTargets:
    names = (*TOPK, *DRAWS) if tail == "sampled" else TOPK
    labels = batch["labels"] if "labels" in batch else next_tokens(batch["tokens"], xp=jnp)
    return BatchTargets(
        jnp.asarray(labels),
        jnp.asarray(batch["loss_mask"]),
        **{name: jnp.asarray(batch[name]) for name in names},
    )


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


def _check_settings(
    batch: Mapping[str, Any],
    recipe: Recipe,
    temperature: Scalar,
    alpha: Scalar,
    *,
    prior: Array | np.ndarray | None,
    vocabulary: int,
) -> None:
    """ValueError for settings that contradict each other or lack an array."""
    check_values(Loss(**{n: getattr(recipe, n) for n in ("divergence", "mix", "tail")}))
    _check_number("temperature", temperature, TEMPERATURE)
    _check_number("alpha", alpha, SHARE)
    if recipe.tail == "sampled":
        _check_draws(batch, temperature)
    if (recipe.tail == "prior") != (prior is not None):
        raise ValueError(
            'tail="prior" needs prior=cache.tail_prior(), and no other tail takes a prior'
        )
    if prior is not None and prior.shape[-1] != vocabulary:
        raise ValueError(
            f"prior has {prior.shape[-1]} columns, but the cache's tokenizer has {vocabulary} ids; "
            "take cache.tail_prior() of the cache that the batches come from"
        )


def _check_draws(batch: Mapping[str, Any], temperature: Scalar) -> None:
    if missing := [name for name in DRAWS if name not in batch]:
        raise ValueError(
            f'this batch has no {missing[0]}, which tail="sampled" learns from: its cache was '
            'captured without draws from the tail. Use tail="bucket" or tail="prior", or capture '
            "with --signals.logits.draws 16"
        )
    highest = getattr(batch, "highest_temperature", None)
    if highest and _is_known(temperature) and float(temperature) > highest + 1e-6:
        raise ValueError(
            f"temperature is {float(temperature):.4g}, but the cache's tails were drawn from at T "
            f"up to {highest:.4g}; above it a few draws would weigh more than all others. Use "
            'tail="bucket" or tail="prior", or capture with --signals.logits.draw-temperatures 1 '
            f"{float(temperature):.4g}"
        )


def _check_number(name: str, value: Scalar, bounds: Bounds) -> None:
    if _is_known(value) and float(value) not in bounds:
        raise ValueError(f"{name} is {value}; expected a number, {bounds}")


def _is_known(value: Any) -> bool:
    """Whether the number is known now. Reading a JAX array would wait for the device."""
    return isinstance(value, int | float | np.number)
