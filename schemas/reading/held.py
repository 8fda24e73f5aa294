"""What caches hold for a loss."""

from __future__ import annotations

from collections.abc import Sequence

from decant.schemas.disk.layout import COUNTS, SKETCH
from decant.schemas.reading.cache import Cache
from decant.served_losses import Held


def held_by(caches: Sequence[Cache]) -> Held:
    """What each of these caches with targets holds."""
    each = [_held_by_one(cache) for cache in caches]
    teachers = {cache.manifest.logits.teacher_id for cache in caches}
    drawn = [held.drawn_at for held in each]
    return Held(
        k=min(held.k for held in each),
        counts=all(held.counts for held in each),
        sketch=all(held.sketch for held in each),
        drawn_at=None if None in drawn else min(at for at in drawn if at is not None),
        prior=all(held.prior for held in each) and len(teachers) == 1,
        labels=all(held.labels for held in each),
        writers=all(held.writers for held in each),
        unmatched=all(held.unmatched for held in each),
        tail_at_1=any(held.tail_at_1 for held in each),
    )


def _held_by_one(cache: Cache) -> Held:
    logits, signals = cache.manifest.logits, cache.manifest.signals
    return Held(
        k=logits.k,
        counts=COUNTS in signals,
        sketch=SKETCH in signals,
        drawn_at=1 / min(logits.draw_betas) if logits.draws else None,
        prior=cache.has_tail_prior,
        labels=logits.labels,
        writers=bool(cache.manifest.writers),
        unmatched=logits.unmatched > 0,
        tail_at_1=logits.tail_at_1,
    )
