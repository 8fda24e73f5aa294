"""Batches of train rows in a shuffled order that can be continued exactly.

Grain shuffles and batches *row numbers*; one vectorised read a batch runs in a thread that is
ahead of the step. Its state is a bare index, which another seed, batch or set of rows would
accept silently and turn into other data: hence the fingerprint beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from decant.schemas import Cache
from decant.trainer.config import Data
from decant.trainer.data.mixture import Reader, Turns, shares

BATCHES_AHEAD = 2
# Endless for any run; Grain's own endless repetition overflows with batches of one row.
EPOCHS = 1_000_000
ROWS = 10**12
_SETTINGS = {"seed": "data.seed", "batch_rows": "data.batch_rows", "caches": "data.caches"}
"""What `--allow` calls the parts of a fingerprint; the others are the cache's."""


class Batches:
    """Endless batches: dicts as from `Cache.read`, and their `rows`, those of all processes."""

    def __init__(
        self,
        cache: Cache,
        *,
        config: Data,
        others: Sequence[Cache] = (),
        signals: Sequence[str] = (),
        here: np.ndarray | None = None,
    ):
        """Read `logits` and, undecoded, these signals too; of `others` as `config.caches` weighs.

        `here` are the places of a batch whose rows this process reads (None: all). Every process
        shuffles all rows and takes its own of each batch, so that the order is the same on any
        number of them.
        """
        self._caches, self._config = [cache, *others], config
        self._signals, self._here = signals, here
        rows = cache.rows(split="train")
        if len(rows) < config.batch_rows:
            raise ValueError(
                f"{cache.path}: {len(rows)} train rows do not fill one batch of "
                f"data.batch_rows = {config.batch_rows}; capture more text or use smaller batches"
            )
        self.fingerprint = _fingerprint(self._caches, config)
        self._first_row = 0
        self._iterator = self._from(0)

    def next(self) -> dict[str, np.ndarray]:
        """The next batch, usually read already."""
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """Position after the batches taken so far, with what it is a position in."""
        return {
            "position": self._iterator.get_state(),
            "first_row": self._first_row,
            "fingerprint": self.fingerprint,
        }

    def restore(
        self, state: dict[str, Any], *, allows: Callable[[str], bool] = lambda _: False
    ) -> None:
        """Go to a saved position. ValueError if it is one in other data that is not allowed.

        In batches of another size the next row is the same; in another order or other rows it is
        the first.
        """
        saved, first = state["fingerprint"], state.get("first_row", 0)
        differing = {name for name, now in self.fingerprint.items() if saved.get(name) != now}
        refused = [n for n in self.fingerprint if n in differing and not allows(_setting(n))]
        if refused:
            differences = [
                f"{name}: saved {saved.get(name)!r}, now {self.fingerprint[name]!r}"
                for name in refused
            ]
            raise ValueError(
                "this data position is one in other data and would continue elsewhere: "
                + "; ".join(differences)
            )
        if differing == {"batch_rows"}:
            first += state["position"]["next_index"] * saved["batch_rows"]
        elif differing:
            first = 0
        if first != self._first_row:
            self._iterator.close()
            self._iterator = self._from(first)
        if not differing:
            self._iterator.set_state(state["position"])

    def close(self) -> None:
        """Stop reading ahead."""
        self._iterator.close()

    def _from(self, first: int) -> Any:
        """Batches from this row of the run on."""
        self._first_row = first
        order, read = _order(self._caches, self._config), self._read()
        # One reader thread: numbers are free, and a batch is one vectorised read behind it.
        numbers = order[first:].batch(self._config.batch_rows)
        batches = numbers.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        return iter(
            grain.experimental.ThreadPrefetchIterDataset(
                batches.map(read), prefetch_buffer_size=BATCHES_AHEAD
            )
        )

    def _read(self) -> Callable[[Any], dict[str, np.ndarray]]:
        (cache, *others), here = self._caches, self._here
        signals = ("logits", *self._signals)

        def mine(values: np.ndarray) -> np.ndarray:
            return values if here is None else values[here]

        def one(numbers: np.ndarray) -> dict[str, np.ndarray]:
            # As stored: a byte a number crosses to the device, not four.
            return {"rows": numbers, **cache.read(mine(numbers), signals=signals, decode=False)}

        if not others:
            return one
        reader = Reader(self._caches, signals=self._signals)
        paths = [str(some.path) for some in self._caches]

        def several(elements: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
            owners, numbers = elements
            called = [f"{paths[o]}:{n}" for o, n in zip(owners, numbers, strict=True)]
            return {"rows": np.array(called), **reader.read(mine(owners), mine(numbers))}

        return several


def updates(cache: Cache, *, config: Data) -> int:
    """How many updates a run makes: `steps`, or as many whole batches as `epochs` of the main
    cache hold, with the others' rows among them."""
    if config.steps is not None:
        return config.steps
    rows = config.epochs * len(cache.rows(split="train"))
    return int(rows / shares(config)[0]) // config.batch_rows


def _order(caches: Sequence[Cache], config: Data) -> grain.MapDataset:
    """All rows of a run: numbers, or (cache, number) where there are several."""

    def shuffled(cache: Cache, seed: int) -> grain.MapDataset:
        numbers = grain.MapDataset.source(cache.rows(split="train").tolist())
        return numbers.shuffle(seed=seed % 2**32).repeat(EPOCHS)

    # An order of its own for each, of which the main cache's is what it would be alone.
    orders = [shuffled(cache, config.seed + 7919 * i) for i, cache in enumerate(caches)]
    if len(orders) == 1:
        return orders[0]
    turns = Turns(shares(config))

    def element(row: int) -> tuple[int, Any]:
        owner, turn = turns.at(row)
        return owner, orders[owner][turn]

    return grain.MapDataset.range(ROWS).map(element)


def _fingerprint(caches: Sequence[Cache], config: Data) -> dict[str, Any]:
    def described(cache: Cache) -> dict[str, Any]:
        rows, forgotten = cache.rows(split="train"), cache.manifest.forgotten_id
        return {
            **({"forgotten": forgotten} if forgotten else {}),
            "train_rows": len(rows),
            "numbers": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16],
            "rows_id": cache.manifest.rows_id,
        }

    cache, *others = caches
    ordered = {"seed": config.seed, "batch_rows": config.batch_rows, **described(cache)}
    if not others:
        return ordered
    weighed = zip(config.caches, others, strict=True)
    return ordered | {
        "caches": [{"weight": mixed.weight, **described(other)} for mixed, other in weighed]
    }


def _setting(name: str) -> str:
    return _SETTINGS.get(name, "rows_id")
