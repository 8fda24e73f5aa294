"""The distillation loss on torch tensors, without ever holding the logits of a whole batch.

Only one chunk of positions has logits at a time. From them come the loss and its gradient, so that
the backward pass computes nothing but a product with the incoming gradient. Values and gradients
equal those of `decant train` (tests/reference/test_torch_losses.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from decant.schemas.reading.held import held_by_batch
from decant.schemas.targets.sketch import SketchHead
from decant.schemas.targets.unmatched import Partners
from decant.served_losses import Asked, Divergence, Tail
from decant.torch.chunks import Call, Chunks
from decant.torch.divergences import Parts
from decant.torch.settings import Settings
from decant.torch.sketches import SketchTables, sketch_tables
from decant.torch.tail_prior import Prior
from decant.torch.targets import counted_positions, require_targets, targets_of

Sketch = SketchTables | Sequence[SketchHead] | None


def loss(
    hidden: Float[Tensor, "batch position width"],
    unembedding: Float[Tensor, "vocab width"],
    batch: Mapping[str, Tensor],
    *,
    temperature: float = 1.0,
    alpha: float | None = None,
    tail: Tail | None = None,
    divergence: Divergence = "forward_kl",
    mix: float = 0.5,
    clip: float = 0.2,
    anchor: float = 0.0,
    prior: Tensor | np.ndarray | None = None,
    sketch: Sketch = None,
    partners: Partners | None = None,
    vocabulary: int | None = None,
    softcap: float | None = None,
    count: Tensor | float | None = None,
    chunk_tokens: int | None = None,
    return_metrics: bool = False,
) -> Float[Tensor, ""] | tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The mean over a batch's counted positions of α·T²·D(teacher ‖ student) + (1 − α)·CE.

    Fused: the logits are computed here, a chunk of positions at a time. Differentiable in `hidden`
    and `unembedding`. The defaults are those of `decant train`.

    ```python
    hidden = student.model(**decant.torch.packed_inputs(batch)).last_hidden_state
    loss = decant.torch.loss(hidden, student.lm_head.weight, batch, temperature=2, tail="bucket")
    loss.backward()
    ```

    Args:
        hidden: the states that the head multiplies, after the final norm.
        unembedding: the head's matrix, as `torch.nn.Linear` and `torch.nn.Embedding` store it.
        batch: from `batches`, `Rows` or a DataLoader, on the device of `hidden`.
        temperature: T ≥ 1 of both distributions.
        alpha: α in [0, 1], the teacher's share of the loss. None: 0.9, or 1 for on_policy.
        tail: how the teacher's tail, the vocabulary outside the stored top-k, is represented.
            `sketch`: by each position's sketch. `sampled`: by draws. `prior`: by the corpus's mean
            tail. `bucket`: as one category. `renormalize`: not at all. `counts`: counts of draws
            from the whole vocabulary stand for the teacher, at T = 1 only. None: at T = 1 counts,
            else sketch, else sampled; at higher T sketch, else sampled; each if the batch holds it
            and the settings allow it. Else prior if it is given, else bucket.
        divergence: D. `forward_kl`, `reverse_kl`, `jsd`, or `tv`, whose factor is T and not T².
            `uld` and `gold` compare sorted probabilities (docs/other-tokenizer.md), `on_policy`
            learns from label_logprobs and writer_logprobs of rollouts (docs/on-policy.md).
        mix: for `jsd` and `gold`: mix·KL(p‖m) + (1−mix)·KL(q‖m) with m = mix·p + (1−mix)·q.
        clip, anchor: for `on_policy`: ε, the clipping of its ratio, and λ, the pull to the writer.
        prior: for tail = "prior": `cache.tail_prior()`.
        sketch: for tail = "sketch": `cache.sketch_heads()`; or `sketch_tables` of them, which are
            moved to the device once and not at every call.
        partners: for divergence = "gold": `cache.partners()`.
        vocabulary: token ids of the cache's tokenizer. None: `batch.vocabulary`, or all of the
            student's if the batch has been copied into a plain dict. The student's other columns
            are left out: a checkpoint may pad its vocabulary.
        softcap: the cap of the student's logits, if it caps them: cap·tanh(logit / cap).
        count: divide by this number in place of the batch's counted positions. With gradient
            accumulation or several processes it is that of all microbatches and processes.
        chunk_tokens: positions whose logits exist at once. None: 256 on a CPU; elsewhere the
            number whose logits take 512 MiB.
        return_metrics: return (loss, metrics) instead. Metrics are means over the batch, named as
            in `metrics.jsonl`: kl_loss (at T), ce_loss, agreement, and tokens, their number; for
            on_policy advantage, ratio and clipped in place of kl_loss and agreement.

    Logits are computed in the dtype of `hidden` (of autocast, inside of it), sums in float32.
    ValueError if the batch lacks what the settings need, or settings contradict each other.
    """
    if tail is None:
        tail = _chosen(batch, temperature=temperature, divergence=divergence, prior=prior)
    settings = Settings(temperature, alpha, tail, divergence, mix, chunk_tokens, clip, anchor)
    if hidden.shape[-1] != unembedding.shape[-1]:
        raise ValueError(
            f"hidden has width {hidden.shape[-1]} and unembedding has shape "
            f"{tuple(unembedding.shape)}; expected [vocabulary, {hidden.shape[-1]}]"
        )
    total, parts = loss_sum(
        hidden,
        unembedding,
        batch,
        settings=settings,
        prior=prior,
        sketch=sketch,
        partners=partners,
        vocabulary=vocabulary,
        softcap=softcap,
    )
    return _mean(total, parts, batch, settings, count=count, return_metrics=return_metrics)


def loss_on_logits(
    logits: Float[Tensor, "batch position vocab"],
    batch: Mapping[str, Tensor],
    *,
    temperature: float = 1.0,
    alpha: float | None = None,
    tail: Tail | None = None,
    divergence: Divergence = "forward_kl",
    mix: float = 0.5,
    clip: float = 0.2,
    anchor: float = 0.0,
    prior: Tensor | np.ndarray | None = None,
    sketch: Sketch = None,
    partners: Partners | None = None,
    vocabulary: int | None = None,
    count: Tensor | float | None = None,
    chunk_tokens: int | None = None,
    return_metrics: bool = False,
) -> Float[Tensor, ""] | tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """As `loss`, from logits that the student has computed. Differentiable in `logits`.

    Takes the memory of all logits and of their gradient.
    """
    if tail is None:
        tail = _chosen(batch, temperature=temperature, divergence=divergence, prior=prior)
    settings = Settings(temperature, alpha, tail, divergence, mix, chunk_tokens, clip, anchor)
    total, parts = loss_sum(
        logits,
        None,
        batch,
        settings=settings,
        prior=prior,
        sketch=sketch,
        partners=partners,
        vocabulary=vocabulary,
    )
    return _mean(total, parts, batch, settings, count=count, return_metrics=return_metrics)


def loss_sum(
    states: Float[Tensor, "batch position width"],
    unembedding: Float[Tensor, "vocab width"] | None,
    batch: Mapping[str, Tensor],
    *,
    settings: Settings,
    prior: Tensor | np.ndarray | None = None,
    sketch: Sketch = None,
    partners: Partners | None = None,
    vocabulary: int | None = None,
    softcap: float | None = None,
) -> tuple[Float[Tensor, ""], Parts]:
    """The loss summed over the counted positions, and its parts at each of them.

    `states` are hidden states; or logits, with the model's cap on them, if `unembedding` is None.
    Parts carry no gradient.
    """
    require_targets(batch, settings)
    if settings.tail == "prior" and prior is None:
        raise ValueError('tail = "prior" needs prior=cache.tail_prior()')
    if settings.tail == "sketch" and sketch is None:
        raise ValueError(
            f'tail = "sketch" (the choice for this batch at T = {settings.temperature:.4g}, if '
            "none is given) needs sketch=cache.sketch_heads()"
        )
    if settings.divergence == "gold" and partners is None:
        raise ValueError('divergence = "gold" needs partners=cache.partners()')
    device = states.device
    counted = counted_positions(batch, device)
    targets = targets_of(batch, counted, settings=settings)
    columns = states if unembedding is None else unembedding.T
    ids = vocabulary or getattr(batch, "vocabulary", None) or columns.shape[-1]
    if columns.shape[-1] < ids:
        raise ValueError(
            f"the student has {columns.shape[-1]} tokens, but the cache's tokenizer has {ids}; "
            "token ids would not line up. Use a student with the teacher's tokenizer"
        )
    at_temperature = None
    if settings.tail == "prior" and prior is not None:
        at_temperature = Prior.at(prior[:, :ids], beta=settings.beta, device=device)
    tables = None
    if settings.tail == "sketch" and sketch is not None:
        tables = sketch if isinstance(sketch, SketchTables) else sketch_tables(sketch)
        tables = tables.to(device)
    common = None
    if settings.divergence == "gold" and partners is not None:
        common = Partners(*(torch.as_tensor(x, device=device) for x in partners))
        if len(common.alone) != ids:
            raise ValueError(
                f"partners has {len(common.alone)} columns, but the cache's tokenizer has {ids} "
                "ids; take it from the cache that the batches come from"
            )
    kind = device.type
    if unembedding is not None and torch.is_autocast_enabled(kind):
        states = states.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        total, *parts = Chunks.apply(
            states.flatten(0, 1)[counted],
            unembedding,
            # Given logits are capped already; their gradient must not pass the cap again.
            Call(
                targets,
                settings,
                at_temperature,
                tables,
                None if unembedding is None else softcap,
                ids,
                common,
            ),
        )
    return total, Parts(*parts)


def _chosen(
    batch: Mapping[str, Tensor],
    *,
    temperature: float,
    divergence: Divergence,
    prior: Tensor | np.ndarray | None,
) -> Tail | None:
    held = replace(held_by_batch(batch), prior=prior is not None)
    return Asked(divergence, None, (temperature,)).best_tail(held)


def _mean(
    total: Float[Tensor, ""],
    parts: Parts,
    batch: Mapping[str, Tensor],
    settings: Settings,
    *,
    count: Tensor | float | None,
    return_metrics: bool,
) -> Any:
    tokens = batch["loss_mask"].sum()
    loss = total / (tokens.clamp(min=1) if count is None else count)
    if not return_metrics:
        return loss
    taught = parts.taught.sum().clamp(min=1)
    names = {"kl_loss": parts.kl, "agreement": parts.agreement}
    if settings.divergence == "on_policy":
        names = {name: getattr(parts, name) for name in ("advantage", "ratio", "clipped")}
    metrics = {name: values.sum() / taught for name, values in names.items()}
    return loss, {**metrics, "ce_loss": parts.ce.sum() / tokens.clamp(min=1), "tokens": tokens}
