"""Who wrote the rollouts of a run with `divergence = "on_policy"`, in a line for its log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import jax

from decant.models import Decoder
from decant.schemas import Cache
from decant.trainer.config import Loss
from decant.trainer.run.trained_student import student_digest


def about_writers(caches: Sequence[Cache], *, loss: Loss, first: Decoder) -> str | None:
    """Whether `first`, the run's first student, wrote the rollouts of all caches.

    None for another divergence.
    """
    if loss.divergence != "on_policy":
        return None
    writers = Counter[str]()
    for cache in caches:
        writers.update(cache.manifest.writers)
    if jax.process_count() > 1:
        return None  # a process holds only a part of the weights
    total, own = writers.total(), writers.pop(student_digest(first), 0)
    if not writers:
        return f"all {total:,} rollouts were written by this run's first student"
    others = ", ".join(f"{name[:12] or 'no name'} ({n:,})" for name, n in writers.most_common(3))
    if len(writers) > 3:
        others += f" and {len(writers) - 3} more"
    return (
        f"{total - own:,} of {total:,} rollouts were not written by this run's first student but "
        f"by {others}. Their importance ratios start away from 1, and clipping may leave most of "
        "their tokens alone (docs/on-policy.md)"
    )
