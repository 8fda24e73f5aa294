"""Judging a student on held-out rows: KL to the teacher, cross-entropy, agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from decant.schemas import Cache, open_cache
from decant.schemas.reading.held import loss_targets
from decant.schemas.signals import SketchSignal
from decant.served_losses import Tail
from decant.torch.divergences import Parts
from decant.torch.losses import loss_sum
from decant.torch.rows import Batch, Rows
from decant.torch.settings import Settings
from decant.torch.sketches import sketch_tables
from decant.torch.targets import counted_positions

Student = Callable[[Batch], Tensor | tuple[Tensor, Tensor]]
"""From a batch to logits [rows, S, vocab], or to hidden states and unembedding, as in `loss`."""

SUMS = (*Parts._fields, "ce_taught", "tokens", "bytes")


class Headline(NamedTuple):
    """The estimate of the KL that students are compared by; see `trainer/judging/headline.py`."""

    name: str
    measure: str
    tail: Tail


DENSE = Headline("dense", "kl_dense", "bucket")
FULL = Headline("full sketch", "kl_full", "sketch")
DRAWS = Headline("draws", "kl_unbiased", "sampled")
COUNTS = Headline("counts", "kl_counts", "counts")
SKETCH = Headline("sketch", "kl_sketch", "sketch")
PRIOR = Headline("prior", "kl_estimate", "prior")
TO_COUNTS = Headline("to counts", "kl_to_counts", "counts")
BOUND = Headline("bound", "kl_bound", "bucket")


def headline(cache: Cache) -> Headline:
    """The best estimate that all held-out positions of the cache allow."""
    parts = cache.manifest.parts
    held = [part for part in parts if any(u.split == "heldout" for _, u in part.numbered_units)]
    kept = [part.logits for part in held or parts if part.logits]
    if all(logits.k >= cache.manifest.vocabulary_size for logits in kept):
        return DENSE
    if not all(logits.k for logits in kept):
        return TO_COUNTS
    signals = cache.manifest.signals
    sketch = signals.get(SKETCH.tail)
    if isinstance(sketch, SketchSignal) and sketch.rank == sketch.teacher_width:
        return FULL
    if all(logits.draws for logits in kept):
        return DRAWS
    if stored := [each for each in (COUNTS, SKETCH) if each.tail in signals]:
        return stored[0]
    return PRIOR if cache.has_tail_prior else BOUND


@torch.no_grad()
def evaluate(
    student: Student,
    cache: Cache | str | Path,
    *,
    batch_rows: int = 2,
    device: torch.device | str = "cpu",
    softcap: float | None = None,
) -> dict[str, Any]:
    """Means over the held-out positions of a cache that have a teacher's target, at T = 1.

    ```python
    decant.torch.evaluate(lambda batch: model(**packed_inputs(batch)).logits, "runs/cache")
    ```

    Returns what `decant train` reports on held-out rows: heldout_kl in nats, the best estimate that
    the cache allows, and heldout_kl_by, its name; heldout_kl_bound, a lower bound, if the cache has
    a top-k; heldout_ce; heldout_perplexity; heldout_agreement, the share of positions where student
    and teacher have the same likeliest token; heldout_tokens. heldout_bits_per_byte is over all
    labels (`models/text/text_bytes.py`); it is left out if the package tokenizers is missing, or
    the tokenizer does not tell bytes. Put the student into its evaluation mode first. `softcap` is
    as in `loss`. ValueError if the cache has no held-out rows.
    """
    opened = open_cache(cache) if isinstance(cache, str | Path) else cache
    judge, totals = Judge(opened), np.zeros(len(SUMS))
    rows = Rows(opened, split="heldout", targets=judge.targets)
    for start in range(0, len(rows), batch_rows):
        batch = rows[range(start, min(start + batch_rows, len(rows)))].to(device)
        output = student(batch)
        states, unembedding = output if isinstance(output, tuple) else (output, None)
        sums = judge.row_sums(states, unembedding, batch, softcap=softcap)
        totals += sums.sum(0).double().cpu().numpy()
    return {f"heldout_{name}": value for name, value in judge.means(totals.tolist()).items()}


class Judge:
    """Sums over held-out positions, and the means that they give."""

    def __init__(self, cache: Cache):
        self.headline = headline(cache)
        self._settings = Settings(alpha=1.0, tail=self.headline.tail)
        self._prior = cache.tail_prior() if self.headline.tail == "prior" else None
        self._sketch = None
        if self.headline.tail == "sketch":
            self._sketch = sketch_tables(cache.sketch_heads())
        self._vocabulary = cache.manifest.vocabulary_size
        self._bytes = _bytes_of_ids(cache)

    @property
    def targets(self) -> tuple[str, ...]:
        """The `targets` of `Rows` that batches must hold."""
        return loss_targets(self.headline.tail)

    def row_sums(
        self,
        states: Tensor,
        unembedding: Tensor | None,
        batch: Mapping[str, Tensor],
        *,
        softcap: float | None,
    ) -> Float[Tensor, "rows sums"]:
        """`SUMS` of each row."""
        if self._sketch is not None:
            self._sketch = self._sketch.to(states.device)
        _, parts = loss_sum(
            states,
            unembedding,
            batch,
            settings=self._settings,
            prior=self._prior,
            sketch=self._sketch,
            vocabulary=self._vocabulary,
            softcap=softcap,
        )
        spelled = torch.zeros_like(batch["labels"])
        if self._bytes is not None:
            self._bytes = self._bytes.to(spelled.device)
            spelled = self._bytes[batch["labels"]] * batch["loss_mask"]
        return torch.cat([row_sums(batch, parts), spelled.sum(-1, keepdim=True)], -1)

    def means(self, totals: Sequence[float]) -> dict[str, Any]:
        """Means by name from the sums over all rows. ValueError if no position counts."""
        sums = dict(zip(SUMS, totals, strict=True))
        for name in ("loss", "advantage", "ratio", "clipped"):
            sums.pop(name)
        sums.pop("tokens")
        whole, spelled = sums.pop("ce"), sums.pop("bytes")
        sums["ce"] = sums.pop("ce_taught")
        taught = sums.pop("taught")
        if not taught:
            raise ValueError("no position of the held-out rows has a target to judge by")
        if self.headline == TO_COUNTS:
            del sums["kl_bound"]  # no top-k is stored
        means = {name: x / taught for name, x in sums.items()}
        return {
            "kl": means["kl"],
            "kl_by": self.headline.name,
            self.headline.measure: means["kl"],
            **means,
            "perplexity": math.exp(min(means["ce"], 700.0)),
            "tokens": int(taught),
            **({"bits_per_byte": whole / (math.log(2) * spelled)} if spelled else {}),
        }


def row_sums(batch: Mapping[str, Tensor], parts: Parts) -> Float[Tensor, "rows sums"]:
    """Sums over each row's counted positions: `SUMS` without bytes."""
    mask = batch["loss_mask"]
    rows = counted_positions(batch, parts.kl.device) // mask.shape[1]
    values = torch.stack([*parts, parts.ce * parts.taught, torch.ones_like(parts.kl)], -1)
    return values.new_zeros(len(mask), values.shape[-1]).index_add(0, rows, values)


def _bytes_of_ids(cache: Cache) -> Tensor | None:
    """The bytes that each id spells; None if they are not known."""
    if find_spec("tokenizers") is None:
        return None
    from decant.models.text.text_bytes import bytes_of_ids

    sizes = bytes_of_ids(cache)
    return None if sizes is None else torch.from_numpy(sizes)
