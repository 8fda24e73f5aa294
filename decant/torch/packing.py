"""Packed rows: several documents in one row, between which attention must not cross."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def attention_mask(segment_ids: Int[Tensor, "batch position"]) -> Bool[Tensor, "batch 1 q key"]:
    """Which keys each query sees: earlier positions and itself, of its own document.

    For `torch.nn.functional.scaled_dot_product_attention(…, attn_mask=mask)`.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same.tril()[:, None]


def packed_inputs(batch: Mapping[str, Tensor], *, flatten: bool = False) -> dict[str, Any]:
    """Arguments for a Hugging Face model, which then keeps the documents of a row apart.

    Transformers does so if positions start anew, and no attention mask and no key/value cache are
    given. With a cache, which is many models' default, documents see each other without a warning.

    `flatten` makes one row of the batch, as FlashAttention needs: with several rows it lets
    documents see each other. `require_separate_segments` finds out whether a model does.
    """
    ids, positions = batch["tokens"], batch["positions"]
    if flatten:
        ids, positions = ids.reshape(1, -1), positions.reshape(1, -1)
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}


@torch.no_grad()
def require_separate_segments(model: Any, *, flatten: bool = False, length: int = 8) -> None:
    """ValueError if a Hugging Face model lets a document of a packed row see the one before it.

    Two rows of two documents of `length` tokens run twice, with other first documents. The logits
    of the second ones must stay the same. Models that carry a state along the row fail, such as
    state-space models.
    """
    device = next(model.parameters()).device
    tokens = torch.arange(4 * length, device=device).reshape(2, 2 * length) % 16
    other = tokens.clone()
    other[:, :length] = (other[:, :length] + 3) % 16
    positions = torch.arange(2 * length, device=device).repeat(2, 1) % length
    training = model.training
    model.eval()
    seen = [
        model(**packed_inputs({"tokens": x, "positions": positions}, flatten=flatten))
        .logits.reshape(2, 2 * length, -1)[:, length:]
        .float()
        for x in (tokens, other)
    ]
    model.train(training)
    difference = (seen[0] - seen[1]).abs().max().item()
    scale = seen[0].abs().max().item()
    if not difference <= 1e-3 * scale:
        raise ValueError(
            f"{type(model).__name__} lets the documents of a packed row see each other: other text "
            f"before a document changes its logits by up to {difference:.3g}. Use another "
            "attn_implementation, such as sdpa or eager, or a model without a state that runs "
            "along the row"
        )
