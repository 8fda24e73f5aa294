"""Which arrays of a batch the loss reads, whether a cache has them, and their way to the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from decant.models.mesh.sharding import local_rows, shard_rows
from decant.schemas import Cache
from decant.schemas.disk.layout import COUNTS as COUNTED
from decant.schemas.disk.layout import SKETCH as SKETCHED
from decant.schemas.signals import scale_name
from decant.schemas.targets.unmatched import UNMATCHED
from decant.trainer.loss.choice import ADD_COUNTS, ADD_SKETCH, Held
from decant.trainer.loss.settings import Divergence, Loss, Tail

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
    logits = cache.manifest.logits
    _check_aligned(cache, loss)
    if loss.divergence == "on_policy":
        _check_written(cache, mixed=mixed)
    for name, remedy in {COUNTED: ADD_COUNTS, SKETCHED: ADD_SKETCH}.items():
        if loss.tail == name and name not in cache.manifest.signals:
            raise ValueError(
                f"{cache.path}: holds {_held(cache)}, but not what loss.tail = {name} learns "
                f"from. Leave loss.tail out for the best that it holds, or {remedy}"
            )
    if not logits.k and loss.tail not in (None, "counts"):
        raise ValueError(
            f"{cache.path}: holds {_held(cache)}, and no top-k, which loss.tail = {loss.tail} "
            "learns from. Use --loss.tail counts, or capture with --signals.logits.k 8"
        )
    if loss.tail != "sampled":
        return
    if not logits.draws:
        raise ValueError(
            f"{cache.path}: holds {_held(cache)}, but no draws from the tail, which loss.tail = "
            "sampled learns from. Leave loss.tail out for the best that it holds, or capture with "
            "--signals.logits.draws 16"
        )
    highest = max(loss.schedules["temperature"].ends)
    drawn_at = 1 / min(logits.draw_betas)
    if highest > drawn_at + 1e-6:
        raise ValueError(
            f"{cache.path}: its tails were drawn from at T up to {drawn_at:.4g}, but "
            f"loss.temperature goes up to {highest:.4g}, where a few draws would weigh more than "
            "all others. Leave loss.tail out for the best that it holds, or capture with "
            f"--signals.logits.draws 16 --signals.logits.draw-temperatures 1 {highest:.4g}"
        )


def _check_written(cache: Cache, *, mixed: bool) -> None:
    if not cache.manifest.logits.labels:
        raise ValueError(
            f"{cache.path}: holds no teacher's log-probabilities of the texts' own tokens, which "
            "divergence = on_policy learns from. Capture the texts again with this release"
        )
    if not mixed and not cache.manifest.writers:
        raise ValueError(
            f"{cache.path}: its texts come without the log-probabilities of the model that wrote "
            "them, which divergence = on_policy learns from. Write rollouts with `decant generate "
            "RUN --prompts FILE --jsonl --logprobs --output rollouts.jsonl` and capture them "
            "(docs/on-policy.md), or use --loss.divergence forward_kl"
        )


def _check_aligned(cache: Cache, loss: Loss) -> None:
    """ValueError if targets that `decant align` made do not serve the loss."""
    logits = cache.manifest.logits
    if loss.divergence == "gold" and not logits.unmatched:
        raise ValueError(
            f"{cache.path}: does not say which of the teacher's tokens the student has too, which "
            "loss.divergence = gold compares apart. Use `decant align CACHE --tokenizer PATH "
            "--targets matched`, or uld or forward_kl"
        )
    highest = max(loss.schedules["temperature"].ends)
    lowest = min(loss.schedules["temperature"].ends)
    if logits.tail_at_1 and not lowest == highest == 1:
        raise ValueError(
            f"{cache.path}: was aligned from a cache without a sketch, so its tails are known at "
            f"T = 1 only, but loss.temperature goes up to {highest:.4g}. Use --loss.temperature 1, "
            "or add a sketch to the first cache and align again: the same precompute config with "
            "--signals.logits.sketch.rank 64"
        )


def _held(cache: Cache) -> str:
    return str(Held.by([cache]))
