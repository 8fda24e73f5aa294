"""The teacher's tail from sketches: its shape at any T, position by position.

`schemas/targets/sketch.py` says what a sketch is. A chunk's logits ẑ come from one product with the
stacked heads of all bases. The target at β = 1/T is the stored head, and on the tail the stored
mass t times softmax(β·ẑ) over the tail, with the heads' offsets at β. No gradient goes through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from decant.schemas.targets.sketch import SketchHead, offset_weights, stacked_offsets
from decant.torch.targets import Targets, set_stored


class SketchTables(NamedTuple):
    """What turns sketches of B bases into logits; from `sketch_tables`."""

    head: Float[Tensor, "bases_r vocab"]
    """The bases' heads below each other, each filled up with zeros to r rows."""
    bias: Float[Tensor, "bases vocab"]
    softcap: float | None
    """Cap of the teacher's logits."""
    offsets: Float[Tensor, "betas bases vocab"] | None = None
    """The biases' offsets at `schemas.targets.sketch.OFFSET_BETAS`; None for none."""

    def to(self, device: torch.device | str) -> SketchTables:
        """The tables on another device."""
        offsets = None if self.offsets is None else self.offsets.to(device)
        return SketchTables(self.head.to(device), self.bias.to(device), self.softcap, offsets)

    def bias_at(self, beta: float) -> Float[Tensor, "bases vocab"]:
        """The biases with their offsets at β."""
        if self.offsets is None:
            return self.bias
        weights = torch.as_tensor(offset_weights(beta), dtype=torch.float32)
        return self.bias + torch.tensordot(weights.to(self.bias.device), self.offsets, 1)


def sketch_tables(
    heads: Sequence[SketchHead], *, device: torch.device | str = "cpu"
) -> SketchTables:
    """The tables for a cache's batches, on the device of the student's states. Make them once.

    ```python
    tables = decant.torch.sketch_tables(cache.sketch_heads(), device="cuda")
    loss = decant.torch.loss(hidden, weight, batch, temperature=4, sketch=tables)
    ```

    They take 4 bytes · (rank + 4) · vocabulary for each basis. ValueError if there are no heads, or
    if their teachers cap their logits differently: a batch has one cap.
    """
    if not heads:
        raise ValueError("this cache has no sketch; use another tail, or add one to the cache")
    if len(caps := {head.softcap for head in heads}) > 1:
        raise ValueError(
            f"sketches of teachers whose logits are capped at {sorted(map(str, caps))} cannot be "
            "mixed in one batch; use another tail"
        )
    rank = max(len(head.head) for head in heads)
    padded = [np.pad(head.head, [(0, rank - len(head.head)), (0, 0)]) for head in heads]
    offsets = stacked_offsets(heads)
    return SketchTables(
        torch.tensor(np.concatenate(padded), dtype=torch.float32, device=device),
        torch.tensor(np.stack([head.bias for head in heads]), dtype=torch.float32, device=device),
        heads[0].softcap,
        None if offsets is None else torch.tensor(offsets, device=device),
    )


class SketchShape(NamedTuple):
    """The tails' shapes of n positions: s = softmax(β·ẑ) over each tail, 0 in stored columns."""

    s: Float[Tensor, "n vocab"]
    entropy: Float[Tensor, " n"]
    """Σ s·log s."""
    log_s: Float[Tensor, "n vocab"] | None
    """Arbitrary in stored columns. None unless it was asked for: it is as large as the logits."""

    @classmethod
    def of(
        cls,
        targets: Targets,
        tables: SketchTables,
        *,
        beta: float,
        vocabulary: int,
        with_log: bool,
    ) -> SketchShape:
        """The shapes at β for positions with a sketch."""
        logits = _logits(targets, tables, beta=beta, vocabulary=vocabulary).mul_(beta)
        log_s = torch.log_softmax(set_stored(logits, targets, -torch.inf), -1)
        s = log_s.exp().nan_to_num_(0.0)  # NaN: every column is stored
        log_s.nan_to_num_(0.0, neginf=0.0)
        return cls(s, torch.einsum("nv,nv->n", s, log_s), log_s if with_log else None)

    def tail_sums(self, _: Targets) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Σ s, which is 1 or for an empty tail 0, and Σ s·log s."""
        return self.s.sum(-1), self.entropy

    def expected(self, tails: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
        """Σ s·x, for x that is 0 in the stored columns."""
        return torch.einsum("nv,nv->n", self.s, tails)

    def add_to(
        self, x: Float[Tensor, "n vocab"], factor: Float[Tensor, " n"], _: Targets
    ) -> Float[Tensor, "n vocab"]:
        """`x` itself, with factor·s added."""
        return x.addcmul_(self.s, factor[:, None])

    def spread(self, log_mass: Float[Tensor, " n"], _: Targets) -> Float[Tensor, "n vocab"]:
        """log of a tail's mass spread as s is; stored columns hold arbitrary numbers."""
        assert self.log_s is not None
        return log_mass[:, None] + self.log_s


def _logits(
    targets: Targets, tables: SketchTables, *, beta: float, vocabulary: int
) -> Float[Tensor, "n vocab"]:
    """ẑ of each position at β, up to a constant, in memory that may be overwritten."""
    sketch, basis, bases = targets.sketch, targets.sketch_basis, len(tables.bias)
    assert sketch is not None
    assert basis is not None
    sketch = functional.pad(sketch, (0, len(tables.head) // bases - sketch.shape[-1]))
    head, bias = tables.head[:, :vocabulary], tables.bias_at(beta)[:, :vocabulary]
    if bases == 1:
        logits = torch.addmm(bias[0], sketch, head)
    else:
        own = functional.one_hot(basis, bases).to(sketch.dtype)
        logits = (own[:, :, None] * sketch[:, None]).flatten(1) @ head + own @ bias
    cap = tables.softcap
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
