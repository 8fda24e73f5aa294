"""What caches and batches hold for a loss, and what a loss reads of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from decant.schemas.disk.layout import COUNTS, SKETCH
from decant.schemas.reading.cache import Cache
from decant.schemas.reading.record_signals import DRAWS, LABELS
from decant.schemas.signals import CountsSignal
from decant.schemas.targets.unmatched import UNMATCHED
from decant.served_losses import Divergence, Held, Tail


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


def draws_of_token(caches: Sequence[Cache], *, tokens: int) -> float | None:
    """How often the counts of `tokens` positions draw a token, on average over the vocabulary.

    Of the cache that stores the fewest draws; None if one has no counts.
    """
    of_caches = [cache.manifest.signals.get(COUNTS) for cache in caches]
    draws = [signal.draws for signal in of_caches if isinstance(signal, CountsSignal)]
    if len(draws) < len(caches):
        return None
    return min(draws) * tokens / caches[0].manifest.vocabulary_size


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


def held_by_batch(batch: Mapping[str, Any]) -> Held:
    """What a batch of `Cache.read` holds, as arrays of any framework.

    Draws of a batch that does not say their T are taken to serve any.
    """
    drawn = all(f"tail_{name}" in batch for name in ("ids", "logprobs", "logweights"))
    highest = getattr(batch, "highest_temperature", None) or math.inf
    return Held(
        k=batch["topk_ids"].shape[-1] if "topk_ids" in batch else 0,
        counts="counts" in batch,
        sketch="sketch" in batch,
        drawn_at=highest if drawn else None,
        labels="label_logprobs" in batch,
        writers="writer_logprobs" in batch,
        unmatched=UNMATCHED in batch,
        tail_at_1=getattr(batch, "tail_at_1", False),
    )


def tail_signals(tail: Tail | None) -> tuple[str, ...]:
    """Signals that a loss with this tail reads beside `logits`."""
    return (tail,) if tail in (COUNTS, SKETCH) else ()


def loss_targets(tail: Tail | None, divergence: Divergence = "forward_kl") -> tuple[str, ...]:
    """`targets` of `Cache.read` for a loss; all others need not be decoded."""
    if divergence == "on_policy":
        return (LABELS,)
    return (DRAWS,) if tail == "sampled" else tail_signals(tail)
