"""Several caches, or groups of one, mixed into one stream of rows: turns, checks and the reader.

Caches without a teacher's targets (`decant tokenise`) are allowed. Their rows are learned from
their next tokens alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from decant.models.text.tokenizer import tokenizer_of
from decant.schemas import BETAS, Cache, open_cache
from decant.schemas.records.rows import WRITER_LOGPROBS
from decant.schemas.signals import AttentionSignal, HiddenSignal
from decant.schemas.targets.targets import nodes_of
from decant.schemas.targets.unmatched import UNMATCHED
from decant.trainer.config import Data, Loss
from decant.trainer.loss.batch_fields import COUNTS, DRAWS, SKETCH, TOPK, check_targets
from decant.trainer.loss.layer_pairs import Pairs

_BLOCK = 1 << 16
_GOLDEN = 2654435769
"""2³² / φ. Multiples of this number modulo 2³² are spread most evenly, so that every stretch of
rows, however short, has about each cache's share of rows."""
_INFINITE_IF_ABSENT = (
    *("topk_logprobs", "tail_logmass", "tail_logprobs", "tail_logweights", "label_logprobs"),
    UNMATCHED,
)
"""Arrays that are padded with −inf. `writer_logprobs` is padded with NaN, all others with 0."""

_OPTIONAL = (UNMATCHED, *DRAWS, *COUNTS, *SKETCH, "label_logprobs")

Arrays = dict[str, np.ndarray]


class Turns:
    """The cache of each row of a mixture, and the number of earlier rows of that cache.

    Both depend on the row's number and the shares only, so that a run can resume at any row.
    """

    def __init__(self, shares: Sequence[float]):
        self._count = len(shares)
        self._edges = np.uint64(2**32) * np.cumsum(shares)[:-1] / np.sum(shares)
        self._before = [np.zeros(self._count, np.int64)]
        self._ranked = functools.lru_cache(maxsize=4)(self._ranks)

    def at(self, row: int) -> tuple[int, int]:
        """(cache, number of earlier rows of that cache) for a row counted from the run's start."""
        block, offset = divmod(row, _BLOCK)
        owners, ranks = self._ranked(block)
        owner = int(owners[offset])
        return owner, int(self._counts(block)[owner] + ranks[offset])

    def _owners(self, block: int) -> np.ndarray:
        with np.errstate(over="ignore"):
            rows = np.arange(_BLOCK, dtype=np.uint64) + np.uint64(block * _BLOCK)
            places = rows * np.uint64(_GOLDEN) % np.uint64(2**32)
        return np.searchsorted(self._edges, places, side="right").astype(np.int16)

    def _ranks(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        owners = self._owners(block)
        ranks = np.zeros(_BLOCK, np.int64)
        for owner in range(self._count):
            mine = owners == owner
            ranks[mine] = np.arange(mine.sum())
        return owners, ranks

    def _counts(self, block: int) -> np.ndarray:
        while len(self._before) <= block:
            owners = self._owners(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(owners, minlength=self._count))
        return self._before[block]


def open_others(config: Data) -> list[Cache]:
    """The caches to mix with the main one."""
    return [open_for(config, mixed.path) for mixed in config.caches]


def open_for(config: Data, path: Path) -> Cache:
    """The cache at a path or address, with the run's mirror."""
    return open_cache(path, mirror=config.mirror, mirror_bytes=config.mirror_bytes)


def cache_shares(config: Data) -> list[float]:
    """The share of all rows that each cache has: the main cache, then those of `config.caches`."""
    weights = [1.0, *(mixed.weight for mixed in config.caches)]
    return [weight / sum(weights) for weight in weights]


def caches_with_targets(caches: Sequence[Cache]) -> list[Cache]:
    """The caches that hold a teacher's targets."""
    return [cache for cache in caches if "logits" in cache.manifest.signals]


def check_mixture(cache: Cache, others: Sequence[Cache], *, loss: Loss, pairs: Pairs) -> None:
    """ValueError if one of `others` cannot be mixed with the main cache for this loss."""
    for other in others:
        for field in ("vocabulary_size", "sequence_length"):
            here, there = getattr(cache.manifest, field), getattr(other.manifest, field)
            if here != there:
                raise ValueError(
                    f"{other.path}: {field.replace('_', ' ')} {there}, but {cache.path} has "
                    f"{here}; one batch cannot hold rows of both. Capture with the same tokenizer "
                    "and --corpus.sequence-length"
                )
        same = other.manifest.tokenizer == cache.manifest.tokenizer
        if why := None if same else tokenizer_of(cache).difference(tokenizer_of(other)):
            raise ValueError(
                f"{other.path}: captured with another tokenizer than {cache.path}; one batch "
                f"cannot hold rows of both. {why}. Capture with the same tokenizer"
            )
    for other in caches_with_targets(others):
        check_targets(other, loss=loss, mixed=True)
        for name in pairs.signals:
            _check_signal(cache, other, name)
        teachers = [c.manifest.logits.teacher_id for c in (cache, other)]
        if loss.tail == "prior" and teachers[0] != teachers[1]:
            raise ValueError(
                f"{other.path}: captured from another teacher than {cache.path} (teacher_id "
                f"{teachers[1][:12]}, {teachers[0][:12]}), but loss.tail = prior uses one "
                "teacher's mean tail for all rows. Use --loss.tail sampled or bucket"
            )


def _check_signal(cache: Cache, other: Cache, name: str) -> None:
    here, there = (c.manifest.signals.get(name) for c in (cache, other))
    same = there is not None and _meaning(here) == _meaning(there)
    if same and isinstance(here, HiddenSignal) and here.directions:
        along, theirs = cache.directions(name), other.directions(name)
        same = along is not None and theirs is not None and np.array_equal(along, theirs)
    if not same:
        raise ValueError(
            f"{other.path}: its {name} is {_described(there)}, but the one in {cache.path} is "
            f"{_described(here)}; a term of the loss needs the same kind of array for all rows. "
            f"Capture {name} with the settings and teacher of {cache.path}, or leave out the term"
        )


def _meaning(signal: Any) -> Any:
    """The fields of a signal that decide what its numbers mean; the others are made equal."""
    free = {"signal_id": "", "shard_rows": 0}
    if isinstance(signal, HiddenSignal):
        free |= {"variance_kept": 1.0, "directions": "some" if signal.directions else None}
    return dataclasses.replace(signal, **free)


def _described(signal: Any) -> str:
    if isinstance(signal, HiddenSignal):
        return f"{signal.dtype}, width {signal.width}, of teacher {signal.teacher_id[:12]}"
    if isinstance(signal, AttentionSignal):
        return f"{signal.dtype}, heads {signal.heads}, of teacher {signal.teacher_id[:12]}"
    return "missing"


class MixtureReader:
    """Reads rows of several caches into arrays whose shapes do not depend on the rows."""

    def __init__(
        self,
        caches: Sequence[Cache],
        *,
        signals: Sequence[str],
        targets: Collection[str] | None = None,
    ):
        """`signals` are read, undecoded, beside `logits`, from the caches that have targets, and
        the `targets` of `Cache.read` (None: those that a cache holds)."""
        self._reads: list[Callable[[np.ndarray], Arrays]] = []
        self._first_basis: list[int] = []
        bases = 0
        for cache in caches:
            read, self._first_basis = cache.read, [*self._first_basis, bases]
            if not caches_with_targets([cache]):
                self._reads.append(functools.partial(read, signals=(), decode=False))
                continue
            named = {"signals": ("logits", *signals), "decode": False, "targets": targets}
            self._reads.append(functools.partial(read, **named))
            if "sketch" in cache.manifest.signals and (targets is None or "sketch" in targets):
                bases += len(cache.sketch_heads())
        first = [read(cache.rows()[:1]) for read, cache in zip(self._reads, caches, strict=True)]
        self._shapes = _common_shapes(first)

    def read(self, owners: np.ndarray, numbers: np.ndarray) -> Arrays:
        """The arrays of a batch, undecoded: at index i row `numbers[i]` of cache `owners[i]`."""
        out = {
            name: np.full((len(numbers), *shape), _absent(name), dtype)
            for name, (shape, dtype) in self._shapes.items()
        }
        for owner in np.unique(owners):
            slots = np.flatnonzero(owners == owner)
            rows = self._reads[owner](numbers[slots])
            if "sketch_basis" in rows:
                # The trainer stacks the heads of all caches, in their order.
                rows["sketch_basis"] = rows["sketch_basis"] + self._first_basis[owner]
            for name in out.keys() & rows.keys():
                values = _at_common_nodes(name, rows[name], self._shapes[name][0])
                out[name][(slots, *(slice(length) for length in values.shape[1:]))] = values
        return out


def _absent(name: str) -> float:
    if name == WRITER_LOGPROBS:
        return np.nan
    return -np.inf if name in _INFINITE_IF_ABSENT else 0.0


def _common_shapes(first: Sequence[Arrays]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The shape of a row and the type of each array, from the first row of each cache.

    Axes are as long as the longest. `tail_logmass` has the nodes that all caches have.
    """
    with_targets = [arrays for arrays in first if "topk_ids" in arrays]
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for name in dict.fromkeys(name for arrays in first for name in arrays):
        if name in _OPTIONAL and any(name not in arrays for arrays in with_targets):
            continue  # A cache with targets lacks them, so the loss does not read them.
        present = [arrays[name] for arrays in first if name in arrays]
        lengths = zip(*(array.shape[1:] for array in present), strict=True)
        # A cache of counts alone has no top-k; then the loss reads none.
        no_head = name in TOPK and any(0 in array.shape[1:] for array in present)
        pick = min if name == "tail_logmass" or no_head else max
        shapes[name] = (tuple(pick(length) for length in lengths), present[0].dtype)
    return shapes


def _at_common_nodes(name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`tail_logmass` at the nodes that all caches have; lossless caches store more nodes."""
    if name in TOPK and not shape[-1]:
        return values[..., :0]
    if name != "tail_logmass" or values.shape[-1] == shape[-1]:
        return values
    nodes = nodes_of(values)
    return values[..., [nodes.index(beta) for beta in BETAS]]
