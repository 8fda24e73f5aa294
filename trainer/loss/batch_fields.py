"""Which arrays of a batch the loss reads, whether a cache has them, and their way to the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from decant.models.mesh.sharding import local_rows, shard_rows
from decant.schemas import Cache
from decant.schemas.reading.held import held_by
from decant.schemas.signals import scale_name
from decant.schemas.targets.unmatched import UNMATCHED
from decant.served_losses import Divergence, Tail
from decant.trainer.loss.settings import Loss

ROWS = ("tokens", "segment_ids", "positions", "loss_mask")
TOPK = ("topk_ids", "topk_logprobs", "tail_logmass")
DRAWS = ("tail_ids", "tail_logprobs", "tail_logweights")
COUNTS = ("count_ids", "counts")
SKETCH = ("sketch", "sketch_basis")
WRITTEN = ("label_logprobs", "writer_logprobs")
TARGETS = (*ROWS, *TOPK, *DRAWS, *COUNTS, *SKETCH, UNMATCHED)
"""Arrays that some loss or measure reads."""
_OF_TAIL = {"sampled": DRAWS, "counts": COUNTS, "sketch": SKETCH}

Batch = dict[str, Array]
"""Arrays by their name in `Cache.read`, each with a row a sequence."""


def loss_fields(tail: Tail | None, divergence: Divergence = "forward_kl") -> tuple[str, ...]:
    """Names of the arrays that every loss with this `tail` and `divergence` reads."""
    if divergence == "on_policy":
        return (*ROWS, *WRITTEN)
    return (*ROWS, *TOPK, *_OF_TAIL.get(tail or "", ()))


def signal_fields(signals: Sequence[str], batch: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the arrays that hold these signals in a batch: the signals and their scales."""
    scales = [scale_name(signal) for signal in signals]
    return [*signals, *(scale for scale in scales if scale in batch)]


def to_device(
    batch: dict[str, np.ndarray],
    *,
    mesh: Mesh,
    rows: int | None = None,
    tail: Tail | None = "bucket",
    divergence: Divergence = "forward_kl",
    signals: Sequence[str] = (),
    everything: bool = False,
) -> Batch:
    """The arrays that the loss reads, or those that any loss reads (`everything`), with their rows
    split over the mesh.

    `rows` is the number of rows of the batch over all processes; `batch` then holds the rows of
    this process (`local_rows`). None: `batch` holds all rows.
    """
    read = loss_fields(tail, divergence)
    fields = [n for n in TARGETS if n in batch] if everything else read
    others = [UNMATCHED] if UNMATCHED in batch else []
    needed = dict.fromkeys((*fields, *others, *signal_fields(signals, batch)))
    if rows is None:
        rows = len(batch["tokens"])
        here = local_rows(mesh, rows)
        batch = {name: batch[name][here] for name in needed}
    return {name: shard_rows(batch[name], count=rows, mesh=mesh) for name in needed}


def check_targets(cache: Cache, *, loss: Loss, mixed: bool = False) -> None:
    """ValueError if the cache lacks the targets that the loss reads.

    `mixed`: it is not the main cache, and for `on_policy` need not hold rollouts.
    """
    if "logits" not in cache.manifest.signals:
        raise ValueError(
            f"{cache.path}: holds rows only (made by `decant tokenise`) and no teacher's targets. "
            "Use it as one of [[data.caches]], mixed with a main cache that has targets"
        )
    held = held_by([cache])
    if mixed:
        held = dataclasses.replace(held, writers=True)
    loss.asked.require_held(held, where=str(cache.path))
