"""The fused loss: one chunk of positions at a time has logits, and gives loss and gradient."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from decant.schemas.targets.unmatched import Partners
from decant.served_losses import BY_RANK
from decant.torch.divergences import Parts, dense_losses, position_losses
from decant.torch.settings import Settings
from decant.torch.sketches import SketchShape, SketchTables
from decant.torch.sorted_probabilities import distance_by_rank
from decant.torch.student_view import TailShape, logits_gradient, summarise_logits
from decant.torch.tail_prior import Prior
from decant.torch.targets import Targets


class Call:
    """The inputs of `Chunks` that have no gradient."""

    def __init__(
        self,
        targets: Targets,
        settings: Settings,
        prior: Prior | None,
        sketch: SketchTables | None,
        softcap: float | None,
        vocabulary: int,
        partners: Partners | None = None,
    ):
        """`partners` is for "gold", on the device."""
        self.partners = partners
        self.targets, self.settings, self.prior, self.sketch = targets, settings, prior, sketch
        self.softcap, self.vocabulary = softcap, vocabulary

    def shape(self, targets: Targets) -> TailShape | None:
        """The tails' shapes of a chunk's positions."""
        if self.sketch is None:
            return self.prior
        return SketchShape.of(
            targets,
            self.sketch,
            beta=self.settings.beta,
            vocabulary=self.vocabulary,
            with_log=self.settings.dense,
        )


class Chunks(torch.autograd.Function):
    """The summed loss of positions, whose gradients the forward pass computes chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, unembedding: Tensor | None, call: Call) -> Any:
        """The loss summed over the positions, and `Parts` of each."""
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
        """The gradients that `forward` has made, times that in the loss."""
        scale = gradients[0]
        return *(x if x is None else x * scale.to(x.dtype) for x in ctx.saved_tensors), None


def _logits(states: Tensor, matrix: Tensor | None, call: Call) -> Float[Tensor, "n vocab"]:
    """float32 logits of a chunk, in memory that may be overwritten."""
    if matrix is None:
        return states[:, : call.vocabulary].to(torch.float32, copy=True)
    logits = _product(states, matrix.T)
    return logits if call.softcap is None else logits.div_(call.softcap).tanh_().mul_(call.softcap)


def _chunk(
    logits: Float[Tensor, "n vocab"], targets: Targets, call: Call, *, wanted: bool
) -> tuple[Float[Tensor, " n"], Parts, Float[Tensor, "n vocab"] | None]:
    """Loss and parts of each position, and the gradient in the uncapped logits if `wanted`."""
    settings, shape = call.settings, call.shape(targets)
    slope = None
    if call.softcap is not None and wanted:
        slope = 1 - (logits / call.softcap) ** 2
    ranks = None
    if settings.divergence in BY_RANK:
        ranks = distance_by_rank(logits, targets, settings=settings, partners=call.partners)
    kept = logits.clone() if settings.dense else logits
    view, exponentials = summarise_logits(kept, targets, settings=settings, shape=shape)
    view, fields = view.leaves()
    with torch.set_grad_enabled(wanted):
        if settings.dense and shape is not None:
            logits.requires_grad_(wanted)
            values, parts = dense_losses(logits, view, targets, settings=settings, shape=shape)
            fields = [*fields, logits]
        else:
            values, parts = position_losses(
                view, targets, settings=settings, shape=shape, ranks=ranks and ranks.term
            )
        if not wanted:
            return values, parts, None
        gradients = list(torch.autograd.grad(values.sum(), fields, allow_unused=True))
    direct = gradients.pop() if settings.dense else None
    gradient = logits_gradient(
        view.like(gradients), exponentials, targets, settings=settings, shape=shape
    )
    if direct is not None:
        gradient += direct
    if ranks is not None:
        share = settings.teachers_share * settings.temperature * ranks.term.weight
        gradient += ranks.gradient.mul_((share * parts.taught)[:, None])
    return values.detach(), parts, gradient if slope is None else gradient.mul_(slope)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of operands in one dtype, summed and returned in float32."""
    if left.dtype == torch.float32:
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _nothing(total: Tensor) -> list[Tensor]:
    return [total.new_zeros(0) for _ in Parts._fields]
