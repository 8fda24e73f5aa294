"""Batches of train rows in a shuffled order that a resumed run continues exactly.

Grain shuffles and batches *row numbers*. A thread ahead of the update reads each batch with one
vectorised call. Grain's state is a bare index: restored with another seed, batch size or set of
rows it gives other data without an error. A fingerprint of these is therefore saved with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Any, cast

import grain
import numpy as np

from decant.schemas import Cache
from decant.trainer.config import Data
from decant.trainer.data.block_order import BlockOrder, sorted_by_group
from decant.trainer.data.fetch_ahead import (
    FetchAhead,
    WholeBlocks,
    holds_a_window,
    most_rows_ahead,
)
from decant.trainer.data.mixture import MixtureReader, Turns, cache_shares, caches_with_targets
from decant.trainer.data.source_weights import epoch_rows, source_weights, streams

BATCHES_AHEAD = 2
# More than any run needs; Grain's own endless repetition overflows with batches of one row.
EPOCHS = 1_000_000
ROWS = 10**12
"""Rows of a mixture, for the same reason."""
_SETTINGS = {
    "seed": "data.seed",
    "batch_rows": "data.batch_rows",
    "shuffle": "data.shuffle",
    "caches": "data.caches",
    "source_weights": "data.source_weights",
}
"""Name in `--allow` of each fingerprint entry; the other entries are `rows_id`."""


class Batches:
    """Endless batches: dicts as from `Cache.read`, with `rows`, the row numbers of all processes.

    With several caches an entry of `rows` is `PATH:NUMBER`.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        config: Data,
        others: Sequence[Cache] = (),
        signals: Sequence[str] = (),
        targets: Collection[str] | None = None,
        here: np.ndarray | None = None,
    ):
        """Batches of `cache`, mixed with `others` in the proportions of `config.caches`.

        `signals` are read, undecoded, beside `logits`, and the `targets` of `Cache.read` (None:
        those that a cache holds). `here` are the indices of a batch whose rows
        this process reads (None: all). Every process shuffles all rows and reads its part of each
        batch, so that the order does not depend on the number of processes. ValueError if the
        train rows of `cache`, or those of an epoch by its weights, do not fill one batch.
        """
        self._caches, self._config = [cache, *others], config
        self._signals, self._targets, self._here = signals, targets, here
        rows = int(min(len(cache.rows(split="train")), epoch_rows(cache, config)))
        if rows < config.batch_rows:
            raise ValueError(
                f"{cache.path}: {rows} train rows do not fill one batch of "
                f"data.batch_rows = {config.batch_rows}; capture more text or use smaller batches"
            )
        self.fingerprint = _fingerprint(self._caches, config)
        self._first_row = 0
        self._ahead: FetchAhead | None = None
        self._iterator = self._from(0)

    def next(self) -> dict[str, np.ndarray]:
        """The next batch, which the thread has usually read already.

        StoreError, an OSError, if a bucket cannot be read.
        """
        if any(cache.mirror for cache in self._caches):
            self._ahead = self._ahead or self._fetch_ahead()
            self._ahead.taken()
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """The position after the batches taken so far, with the fingerprint of the data."""
        return {
            "position": self._iterator.get_state(),
            "first_row": self._first_row,
            "fingerprint": self.fingerprint,
        }

    def restore(
        self, state: dict[str, Any], *, allows: Callable[[str], bool] = lambda _: False
    ) -> None:
        """Go to a saved position.

        `allows` says whether a setting may differ. ValueError if the position belongs to other data
        and a differing setting is not allowed. If only the batch size differs, the next batch
        begins at the next row. If rows or their order differ, it begins at the first row.
        """
        saved, first = state["fingerprint"], state.get("first_row", 0)
        now = self.fingerprint
        names = dict.fromkeys([*now, *(name for name in _SETTINGS if name in saved)])
        differing = {name for name in names if saved.get(name) != now.get(name)}
        refused = [n for n in names if n in differing and not allows(_setting(n))]
        if refused:
            differences = [
                f"{name}: saved {saved.get(name)!r}, now {now.get(name)!r}" for name in refused
            ]
            raise ValueError(
                "this position belongs to other data, where it would give other rows: "
                + "; ".join(differences)
            )
        if differing == {"batch_rows"}:
            first += state["position"]["next_index"] * saved["batch_rows"]
        elif differing:
            first = 0
        self._stop_fetching()
        if first != self._first_row:
            self._iterator.close()
            self._iterator = self._from(first)
        if not differing:
            self._iterator.set_state(state["position"])

    def close(self) -> None:
        """Stop reading ahead."""
        self._iterator.close()
        self._stop_fetching()

    def _stop_fetching(self) -> None:
        if self._ahead:
            self._ahead.close()
            self._ahead = None

    def _from(self, first: int) -> Any:
        """An iterator over batches from row `first` of the run."""
        self._first_row = first
        # One thread for row numbers, which cost nothing; the thread below reads the rows.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        batches, read = self._numbers().to_iter_dataset(options), self._read()
        return iter(
            grain.experimental.ThreadPrefetchIterDataset(
                batches.map(read), prefetch_buffer_size=BATCHES_AHEAD
            )
        )

    def _numbers(self) -> grain.MapDataset:
        """The row numbers of each batch: (numbers,), or (caches, numbers) for several caches."""
        order = _order(self._caches, self._config)
        numbers = order[self._first_row :].batch(self._config.batch_rows)
        return numbers.map(sorted_by_group) if self._config.shuffle == "blocks" else numbers

    def _fetch_ahead(self) -> FetchAhead:
        numbers = self._numbers()  # not those of the iterator's thread, which remember places
        most_rows = most_rows_ahead(self._caches, signals=self._signals)
        # Whole blocks only if the mirror can keep those of a window until all rows are used.
        blocks = self._config.shuffle == "blocks" and holds_a_window(most_rows)
        parts = [
            [WholeBlocks(part.rows) for part in streams(cache, weights)]
            for cache, weights in zip(
                self._caches, _weights(self._caches, self._config), strict=True
            )
        ]
        with_targets = caches_with_targets(self._caches)

        def fetch(some: range) -> list[Future]:
            needed: list[list[np.ndarray]] = [[] for _ in self._caches]
            for batch in some:
                arrays = cast(tuple[np.ndarray, ...], numbers[batch])
                *owners, rows = map(self._of_this_process, arrays)
                owner = owners[0] if owners else np.zeros(len(rows), np.int64)
                for number, mine in enumerate(needed):
                    mine.append(rows[owner == number])
                    if blocks:
                        first = batch * self._config.batch_rows
                        mine[-1:] = [p.of(mine[-1], position=first) for p in parts[number]]
            futures = []
            for cache, mine in zip(self._caches, map(np.concatenate, needed), strict=True):
                if cache.mirror and len(mine):
                    signals = ("logits", *self._signals) if cache in with_targets else ()
                    futures += cache.fetch(np.unique(mine), signals, targets=self._targets)
            return futures

        return FetchAhead(
            fetch,
            first=self._iterator.get_state()["next_index"],
            batch_rows=self._config.batch_rows,
            # Of more than an epoch all is here already, if the mirror holds it.
            most_rows=min(most_rows, sum(map(len, self._caches))),
        )

    def _of_this_process(self, values: np.ndarray) -> np.ndarray:
        return values if self._here is None else values[self._here]

    def _read(self) -> Callable[[Any], dict[str, np.ndarray]]:
        cache, *others = self._caches
        signals, of_this_process = ("logits", *self._signals), self._of_this_process

        def read_one_cache(elements: tuple[np.ndarray]) -> dict[str, np.ndarray]:
            (numbers,) = elements
            # Undecoded, so that one byte a number is sent to the device instead of four.
            batch = cache.read(
                of_this_process(numbers), signals=signals, decode=False, targets=self._targets
            )
            return {"rows": numbers, **batch}

        if not others:
            return read_one_cache
        reader = MixtureReader(self._caches, signals=self._signals, targets=self._targets)
        paths = [source.address for source in self._caches]

        def read_several_caches(elements: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
            owners, numbers = elements
            names = [f"{paths[o]}:{n}" for o, n in zip(owners, numbers, strict=True)]
            batch = reader.read(of_this_process(owners), of_this_process(numbers))
            return {"rows": np.array(names), **batch}

        return read_several_caches


def number_of_updates(cache: Cache, *, config: Data) -> int:
    """The number of updates of a run.

    It is `config.steps`, or the number of whole batches in `config.epochs` passes over the main
    cache `cache`, with the rows of the other caches mixed in. Weights of its groups of files make a
    pass longer or shorter. ValueError for a wrong name in `config.source_weights`.
    """
    rows = config.epochs * epoch_rows(cache, config)
    if config.steps is not None:
        return config.steps
    return int(rows / cache_shares(config)[0]) // config.batch_rows


def _order(caches: Sequence[Cache], config: Data) -> grain.MapDataset:
    """All rows of a run in order: (row number,), or (cache, row number) for several caches.

    A cache with weights is a mixture of its groups of files. With `shuffle = "blocks"` the group of
    the row in `BlockOrder` comes first.
    """
    orders: list[grain.MapDataset] = []
    owners: list[int] = []
    shares: list[float] = []
    for number, (cache, share) in enumerate(zip(caches, cache_shares(config), strict=True)):
        parts = streams(cache, _weights(caches, config)[number])
        rows = sum(len(part.rows) * part.weight for part in parts)
        if not rows:
            raise ValueError(f"{cache.path}: has no train rows to mix with others")
        for group, part in enumerate(parts):
            # Each stream has its own order. That of the main cache is the same as without others.
            seed = (config.seed + 7919 * number + 104_729 * group) % 2**32
            orders.append(_shuffled(part.rows, seed=seed, config=config))
            owners.append(number)
            shares.append(share * (len(part.rows) * part.weight / rows))
    if len(orders) == 1:
        return orders[0]
    turns, several = Turns(shares), len(caches) > 1

    # Not grain.MapDataset.mix: its order of caches differs, and runs that began would change.
    def element(row: int) -> Any:
        stream, turn = turns.at(row)
        *group, number = cast(tuple[int, ...], orders[stream][turn])
        return (*group, owners[stream], number) if several else (*group, number)

    return grain.MapDataset.range(ROWS).map(element)


def _shuffled(rows: np.ndarray, *, seed: int, config: Data) -> grain.MapDataset:
    """Tuples that end with a row number: every row once an epoch."""
    if config.shuffle == "blocks":
        return grain.MapDataset.source(BlockOrder(rows, seed=seed))
    numbers = grain.MapDataset.source(cast(Sequence[int], rows))
    return numbers.shuffle(seed=seed).repeat(EPOCHS).map(lambda row: (row,))


def _weights(caches: Sequence[Cache], config: Data) -> list[dict[str, float]]:
    """The weights in effect of each cache's groups of files."""
    main, *others = caches
    return [source_weights(main, config.source_weights), *map(source_weights, others)]


def _fingerprint(caches: Sequence[Cache], config: Data) -> dict[str, Any]:
    def described(cache: Cache, weights: dict[str, float]) -> dict[str, Any]:
        rows, forgotten = cache.rows(split="train"), cache.manifest.forgotten_id
        return {
            **({"forgotten": forgotten} if forgotten else {}),
            **({"source_weights": weights} if weights else {}),
            "train_rows": len(rows),
            "numbers": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16],
            "rows_id": cache.manifest.rows_id,
        }

    main, *others = map(described, caches, _weights(caches, config))
    ordered = {"seed": config.seed, "batch_rows": config.batch_rows, **main}
    if config.shuffle != "global":  # absent in checkpoints of releases before 0.11
        ordered["shuffle"] = config.shuffle
    if not others:
        return ordered
    weighed = zip(config.caches, others, strict=True)
    return ordered | {"caches": [{"weight": mixed.weight, **other} for mixed, other in weighed]}


def _setting(name: str) -> str:
    return _SETTINGS.get(name, "rows_id")
