"""The tail that the loss learns from if the caller leaves it unset."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from decant.schemas import Cache
from decant.served_losses import BY_RANK, ONLY_FORWARD, Divergence, Tail

ARRAYS: dict[str, Tail] = {"counts": "counts", "sketch": "sketch", "tail_ids": "sampled"}
"""The array of a batch that each tail learns from."""
_TARGET_OF: dict[Tail, str] = {"counts": "counts", "sketch": "sketch", "sampled": "draws"}
"""What `Cache.read` names each of these arrays' targets."""


def choose_tail(
    held: Collection[Tail],
    *,
    temperature: float,
    divergence: Divergence = "forward_kl",
    highest: float | None = None,
    prior: bool = False,
) -> Tail | None:
    """The tail that `decant train` chooses for a constant T; None for on_policy.

    At T = 1 counts, else sketches, else draws; at higher T sketches, else draws up to the T that
    they were made for. Where none of these is held or the divergence allows none: the prior if
    there is one, else bucket. `held` are the tails that a cache or batch has arrays for; `highest`
    is the highest T of its draws, None if it is not known.
    """
    if divergence == "on_policy":
        return None
    if divergence in BY_RANK:
        return "bucket"
    for tail in ("counts", "sketch", "sampled"):
        if tail not in held or (divergence != "forward_kl" and tail in ONLY_FORWARD):
            continue
        if tail == "counts" and temperature != 1:
            continue
        if tail == "sampled" and highest is not None and temperature > highest + 1e-6:
            continue
        return tail
    return "prior" if prior else "bucket"


def weakness(tail: Tail | None, temperature: float) -> str | None:
    """What to say about a tail that teaches little at this T, if it does."""
    if tail is None or temperature < _WEAK.get(tail, float("inf")):
        return None
    return (
        f"tail = {tail}: at T = {temperature:.4g} a student learns little from it "
        "(docs/benchmarks.md). Better is tail = sketch; to add sketches to the cache, run "
        "`decant precompute` again with --signals.logits.sketch.rank 64"
    )


_WEAK: dict[Tail, float] = {"renormalize": 2, "bucket": 2, "prior": 2, "sampled": 4}
"""T from which a student learns little from a tail."""


def targets_read(tails: Collection[Tail]) -> tuple[str, ...]:
    """The `targets` of `Rows` that losses with these tails read."""
    return tuple(target for tail, target in _TARGET_OF.items() if tail in tails)


def held_by_batch(batch: Mapping[str, Tensor]) -> set[Tail]:
    """The tails that a batch has arrays for."""
    return {tail for name, tail in ARRAYS.items() if name in batch}


def held_by_cache(cache: Cache) -> set[Tail]:
    """The tails that all parts of a cache have targets for."""
    manifest = cache.manifest
    held = {"counts", "sketch"} & manifest.signals.keys()
    return {
        tail
        for tail in ARRAYS.values()
        if tail in held or (tail == "sampled" and manifest.logits.draws)
    }
