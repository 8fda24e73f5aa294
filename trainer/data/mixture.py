"""Several caches as one stream of rows: whose turn it is, whether they fit, how they are read.

A cache without the teacher's targets (`decant tokenise`) may be among them: nothing is
stored of its rows, so they are learned from their own next tokens alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from decant.schemas import BETAS, Cache, open_cache
from decant.schemas.signals import AttentionSignal, HiddenSignal
from decant.schemas.targets.targets import nodes_of
from decant.trainer.config import Data, Loss
from decant.trainer.loss.batch_fields import DRAWS, check_targets
from decant.trainer.loss.layer_pairs import Pairs

_BLOCK = 1 << 16
_GOLDEN = 2654435769
"""2³² / φ. Multiples of it fill a circle more evenly than those of any other number do, so every
stretch of rows, however short, has about each cache's share of it."""
_ABSENT = ("topk_logprobs", "tail_logmass", "tail_logprobs", "tail_logweights")
"""Arrays in which −inf says that nothing is stored; 0 in all others."""

Arrays = dict[str, np.ndarray]


class Turns:
    """Which cache each row is of, and how many rows of that cache came before it.

    A function of the row's number and the shares alone, so that any position can be gone on from.
    """

    def __init__(self, shares: Sequence[float]):
        self._count = len(shares)
        self._edges = np.uint64(2**32) * np.cumsum(shares)[:-1] / np.sum(shares)
        self._before = [np.zeros(self._count, np.int64)]
        self._ranked = functools.lru_cache(maxsize=4)(self._ranks)

    def at(self, row: int) -> tuple[int, int]:
        """(cache, its rows before) of this row, counted from the run's first."""
        block, offset = divmod(row, _BLOCK)
        owners, ranks = self._ranked(block)
        owner = int(owners[offset])
        return owner, int(self._counts(block)[owner] + ranks[offset])

    def _owners(self, block: int) -> np.ndarray:
        with np.errstate(over="ignore"):
            rows = np.arange(_BLOCK, dtype=np.uint64) + np.uint64(block * _BLOCK)
            places = rows * np.uint64(_GOLDEN) % np.uint64(2**32)
        return np.searchsorted(self._edges, places, side="right").astype(np.int8)

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
    """The caches that are mixed in. ValueError for a weight that means nothing."""
    for number, mixed in enumerate(config.caches):
        if not 0 < mixed.weight < math.inf:
            raise ValueError(
                f"data.caches[{number}].weight is {mixed.weight}; it is above 0, where the main "
                "cache's is 1"
            )
    return [open_cache(mixed.path) for mixed in config.caches]


def shares(config: Data) -> list[float]:
    """Of the main cache and those mixed in, of all rows."""
    weights = [1.0, *(mixed.weight for mixed in config.caches)]
    return [weight / sum(weights) for weight in weights]


def taught(caches: Sequence[Cache]) -> list[Cache]:
    """Those that hold what a teacher said."""
    return [cache for cache in caches if "logits" in cache.manifest.signals]


def check_mixture(cache: Cache, others: Sequence[Cache], *, loss: Loss, pairs: Pairs) -> None:
    """ValueError that says what of the others does not go with the main cache."""
    for other in others:
        for what in ("tokenizer", "vocabulary_size", "sequence_length"):
            here, there = getattr(cache.manifest, what), getattr(other.manifest, what)
            if here != there:
                raise ValueError(
                    f"{other.path}: {what.replace('_', ' ')} {there}, but {cache.path} has {here}; "
                    "one batch cannot hold rows of both. Capture with the same tokenizer and "
                    "--corpus.sequence-length"
                )
    for other in taught(others):
        check_targets(other, loss=loss)
        for name in pairs.signals:
            _check_signal(cache, other, name)
        teachers = [c.manifest.logits.teacher_id for c in (cache, other)]
        if loss.tail == "prior" and teachers[0] != teachers[1]:
            raise ValueError(
                f"{other.path}: captured from another teacher than {cache.path} (teacher_id "
                f"{teachers[1][:12]}, {teachers[0][:12]}), and loss.tail = prior takes one "
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
            f"{_described(here)}; a term of the loss compares all rows with the same thing. "
            "Capture it as there, from the same teacher, or leave the term out"
        )


def _meaning(signal: Any) -> Any:
    """What must be equal for two arrays to be the same kind of numbers."""
    free = {"signal_id": "", "shard_rows": 0}
    if isinstance(signal, HiddenSignal):
        free |= {"variance_kept": 1.0, "directions": "some" if signal.directions else None}
    return dataclasses.replace(signal, **free)


def _described(signal: Any) -> str:
    if isinstance(signal, HiddenSignal):
        return f"{signal.dtype}, width {signal.width}, of teacher {signal.teacher_id[:12]}"
    if isinstance(signal, AttentionSignal):
        return f"{signal.dtype}, heads {signal.heads}, of teacher {signal.teacher_id[:12]}"
    return "not there"


class Reader:
    """Reads rows of several caches into arrays whose shapes never depend on which rows they are."""

    def __init__(self, caches: Sequence[Cache], *, signals: Sequence[str]):
        """`signals` beside `logits`, undecoded; of caches that have any."""
        self._reads: list[Callable[[np.ndarray], Arrays]] = []
        for cache in caches:
            wanted = ("logits", *signals) if taught([cache]) else ()
            self._reads.append(functools.partial(cache.read, signals=wanted, decode=False))
        first = [read(cache.rows()[:1]) for read, cache in zip(self._reads, caches, strict=True)]
        self._shapes = _common(first, drawn=[f for f in first if "topk_ids" in f])

    def read(self, owners: np.ndarray, numbers: np.ndarray) -> Arrays:
        """Row `numbers[i]` of cache `owners[i]`, undecoded, at index i."""
        out = {
            name: np.full((len(numbers), *shape), -np.inf if name in _ABSENT else 0, dtype)
            for name, (shape, dtype) in self._shapes.items()
        }
        for owner in np.unique(owners):
            slots = np.flatnonzero(owners == owner)
            found = self._reads[owner](numbers[slots])
            for name in out.keys() & found.keys():
                values = _at_common_nodes(name, found[name], self._shapes[name][0])
                out[name][(slots, *(slice(length) for length in values.shape[1:]))] = values
        return out


def _common(
    first: Sequence[Arrays], *, drawn: Sequence[Arrays]
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape of a row and type of each array: as long as the longest, of nodes those all have."""
    found: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for name in dict.fromkeys(name for arrays in first for name in arrays):
        if name in DRAWS and any(name not in arrays for arrays in drawn):
            continue  # Not every teacher's tail was drawn from: nobody asked for draws.
        having = [arrays[name] for arrays in first if name in arrays]
        lengths = zip(*(array.shape[1:] for array in having), strict=True)
        pick = min if name == "tail_logmass" else max
        found[name] = (tuple(pick(length) for length in lengths), having[0].dtype)
    return found


def _at_common_nodes(name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The tail's mass at the nodes that all caches have: those of `lossless` are more."""
    if name != "tail_logmass" or values.shape[-1] == shape[-1]:
        return values
    nodes = nodes_of(values)
    return values[..., [nodes.index(beta) for beta in BETAS]]
