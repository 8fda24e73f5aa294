"""The distillation loss on torch tensors, without ever holding the logits of a whole batch.

Only one chunk of positions has logits at a time. From them come the loss and its gradient, so that
the backward pass computes nothing but a product with the incoming gradient. Values and gradients
equal those of `decant train` (tests/reference/test_torch_losses.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from decant.torch.divergences import Parts, dense_losses, position_losses
from decant.torch.settings import Divergence, Settings, Tail
from decant.torch.student_view import logits_gradient, summarise_logits
from decant.torch.tail_prior import Prior
from decant.torch.targets import Targets, counted_positions, require_draws, targets_of


def loss(
    hidden: Float[Tensor, "batch position width"],
    unembedding: Float[Tensor, "vocab width"],
    batch: Mapping[str, Tensor],
    *,
    temperature: float = 1.0,
    alpha: float = 0.9,
    tail: Tail = "sampled",
    divergence: Divergence = "forward_kl",
    mix: float = 0.5,
    prior: Tensor | np.ndarray | None = None,
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
        alpha: α in [0, 1], the teacher's share of the loss.
        tail: how the teacher's tail, the vocabulary outside the stored top-k, is represented.
            `sampled`: by draws. `prior`: by the corpus's mean tail. `bucket`: as one category.
            `renormalize`: not at all.
        divergence: D. `forward_kl`, `reverse_kl`, `jsd`, or `tv`, whose factor is T and not T².
        mix: for `jsd`: mix·KL(p‖m) + (1−mix)·KL(q‖m) with m = mix·p + (1−mix)·q.
        prior: for tail = "prior": `cache.tail_prior()`.
        vocabulary: token ids of the cache's tokenizer. None: `batch.vocabulary`, or all of the
            student's if the batch has been copied into a plain dict. The student's other columns
            are left out: a checkpoint may pad its vocabulary.
        softcap: the cap of the student's logits, if it caps them: cap·tanh(logit / cap).
        count: divide by this number in place of the batch's counted positions. With gradient
            accumulation or several processes it is that of all microbatches and processes.
        chunk_tokens: positions whose logits exist at once. None: 256 on a CPU; elsewhere the
            number whose logits take 512 MiB.
        return_metrics: return (loss, metrics) instead. Metrics are means over the batch, named as
            in `metrics.jsonl`: kl_loss (at T), ce_loss, agreement, and tokens, their number.

    Logits are computed in the dtype of `hidden` (of autocast, inside of it), sums in float32.
    ValueError if the batch lacks what the settings need, or settings contradict each other.
    """
    settings = Settings(temperature, alpha, tail, divergence, mix, chunk_tokens)
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
        vocabulary=vocabulary,
        softcap=softcap,
    )
    return _mean(total, parts, batch, count=count, return_metrics=return_metrics)


def loss_on_logits(
    logits: Float[Tensor, "batch position vocab"],
    batch: Mapping[str, Tensor],
    *,
    temperature: float = 1.0,
    alpha: float = 0.9,
    tail: Tail = "sampled",
    divergence: Divergence = "forward_kl",
    mix: float = 0.5,
    prior: Tensor | np.ndarray | None = None,
    vocabulary: int | None = None,
    count: Tensor | float | None = None,
    chunk_tokens: int | None = None,
    return_metrics: bool = False,
) -> Float[Tensor, ""] | tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """As `loss`, from logits that the student has computed. Differentiable in `logits`.

    Takes the memory of all logits and of their gradient.
    """
    settings = Settings(temperature, alpha, tail, divergence, mix, chunk_tokens)
    total, parts = loss_sum(
        logits, None, batch, settings=settings, prior=prior, vocabulary=vocabulary
    )
    return _mean(total, parts, batch, count=count, return_metrics=return_metrics)


def loss_sum(
    states: Float[Tensor, "batch position width"],
    unembedding: Float[Tensor, "vocab width"] | None,
    batch: Mapping[str, Tensor],
    *,
    settings: Settings,
    prior: Tensor | np.ndarray | None,
    vocabulary: int | None = None,
    softcap: float | None = None,
) -> tuple[Float[Tensor, ""], Parts]:
    """The loss summed over the counted positions, and its parts at each of them.

    `states` are hidden states; or logits, with the model's cap on them, if `unembedding` is None.
    Parts carry no gradient.
    """
    require_draws(batch, settings)
    if settings.tail == "prior" and prior is None:
        raise ValueError('tail = "prior" needs prior=cache.tail_prior()')
    device = states.device
    counted = counted_positions(batch, device)
    targets = targets_of(batch, counted, draws=settings.tail == "sampled")
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
    kind = device.type
    if unembedding is not None and torch.is_autocast_enabled(kind):
        states = states.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        total, *parts = _Chunks.apply(
            states.flatten(0, 1)[counted],
            unembedding,
            # Given logits are capped already; their gradient must not pass the cap again.
            _Call(targets, settings, at_temperature, None if unembedding is None else softcap, ids),
        )
    return total, Parts(*parts)


class _Call:
    """The inputs of `_Chunks` that have no gradient."""

    def __init__(
        self,
        targets: Targets,
        settings: Settings,
        prior: Prior | None,
        softcap: float | None,
        vocabulary: int,
    ):
        self.targets, self.settings, self.prior = targets, settings, prior
        self.softcap, self.vocabulary = softcap, vocabulary


class _Chunks(torch.autograd.Function):
    """The summed loss of positions, whose gradients the forward pass computes chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, unembedding: Tensor | None, call: _Call) -> Any:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        matrix = None
        if unembedding is not None:
            matrix = unembedding[: call.vocabulary].to(states.dtype)
        d_states = torch.zeros_like(states) if wanted else None
        d_matrix = None
        if unembedding is not None and ctx.needs_input_grad[1]:
            d_matrix = torch.zeros(unembedding.shape, dtype=torch.float32, device=states.device)
        total, parts = torch.zeros((), device=states.device), []
        length = call.settings.chunk_length(device=states.device.type, vocabulary=call.vocabulary)
        for at, targets in call.targets.chunks(length):
            logits = _logits(states[at], matrix, call)
            values, each, d_logits = _chunk(logits, targets, call, wanted=wanted)
            total, parts = total + values.sum(), [*parts, each]
            if d_states is None or d_logits is None:
                continue
            if matrix is None:
                d_states[at, : call.vocabulary] = d_logits.to(d_states.dtype)
                continue
            d_logits = d_logits.to(states.dtype)
            d_states[at] = _product(d_logits, matrix).to(states.dtype)
            if d_matrix is not None:
                d_matrix[: call.vocabulary] += _product(d_logits.T, states[at])
        dtype = None if unembedding is None else unembedding.dtype
        ctx.save_for_backward(d_states, None if d_matrix is None else d_matrix.to(dtype))
        joined = [torch.cat(x) for x in zip(*parts, strict=True)] if parts else _nothing(total)
        ctx.mark_non_differentiable(*joined)
        return total, *joined

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        scale = gradients[0]
        return *(x if x is None else x * scale.to(x.dtype) for x in ctx.saved_tensors), None


def _logits(states: Tensor, matrix: Tensor | None, call: _Call) -> Float[Tensor, "n vocab"]:
    """float32 logits of a chunk, in memory that may be overwritten."""
    if matrix is None:
        return states[:, : call.vocabulary].to(torch.float32, copy=True)
    logits = _product(states, matrix.T)
    return logits if call.softcap is None else logits.div_(call.softcap).tanh_().mul_(call.softcap)


def _chunk(
    logits: Float[Tensor, "n vocab"], targets: Targets, call: _Call, *, wanted: bool
) -> tuple[Float[Tensor, " n"], Parts, Float[Tensor, "n vocab"] | None]:
    """Loss and parts of each position, and the gradient in the uncapped logits if `wanted`."""
    settings, prior = call.settings, call.prior
    slope = None
    if call.softcap is not None and wanted:
        slope = 1 - (logits / call.softcap) ** 2
    kept = logits.clone() if settings.dense else logits
    view, exponentials = summarise_logits(kept, targets, settings=settings, prior=prior)
    view, fields = view.leaves()
    with torch.set_grad_enabled(wanted):
        if settings.dense and prior is not None:
            logits.requires_grad_(wanted)
            values, parts = dense_losses(logits, view, targets, settings=settings, prior=prior)
            fields = [*fields, logits]
        else:
            values, parts = position_losses(view, targets, settings=settings, prior=prior)
        if not wanted:
            return values, parts, None
        gradients = list(torch.autograd.grad(values.sum(), fields, allow_unused=True))
    direct = gradients.pop() if settings.dense else None
    gradient = logits_gradient(
        view.like(gradients), exponentials, targets, settings=settings, prior=prior
    )
    if direct is not None:
        gradient += direct
    return values.detach(), parts, gradient if slope is None else gradient.mul_(slope)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of operands in one dtype, summed and returned in float32."""
    if left.dtype == torch.float32:
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _mean(
    total: Float[Tensor, ""],
    parts: Parts,
    batch: Mapping[str, Tensor],
    *,
    count: Tensor | float | None,
    return_metrics: bool,
) -> Any:
    tokens = batch["loss_mask"].sum()
    loss = total / (tokens.clamp(min=1) if count is None else count)
    if not return_metrics:
        return loss
    taught = parts.taught.sum().clamp(min=1)
    return loss, {
        "kl_loss": parts.kl.sum() / taught,
        "ce_loss": parts.ce.sum() / tokens.clamp(min=1),
        "agreement": parts.agreement.sum() / taught,
        "tokens": tokens,
    }


def _nothing(total: Tensor) -> list[Tensor]:
    return [total.new_zeros(0) for _ in Parts._fields]
