"""Batches of train rows in a shuffled order that can be continued exactly.

Grain shuffles and batches *row numbers*; one vectorised `Cache.read` a batch runs in a thread
that is ahead of the step. Its state is a bare index, which another seed, batch or set of rows
would accept silently and turn into other data: hence the fingerprint beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from schemas import Cache
from trainer.config import Data

BATCHES_AHEAD = 2
# Endless for any run; Grain's own endless repetition overflows with batches of one row.
EPOCHS = 1_000_000


class Batches:
    """Endless batches: dicts as from `Cache.read`, and their `rows`, those of all processes."""

    def __init__(
        self,
        cache: Cache,
        *,
        config: Data,
        signals: Sequence[str] = (),
        here: np.ndarray | None = None,
    ):
        """Read `logits` and, undecoded, these signals too.

        `here` are the places of a batch whose rows this process reads (None: all). Every process
        shuffles all rows and takes its own of each batch, so that the order is the same on any
        number of them.
        """
        rows = cache.rows(split="train")
        if len(rows) < config.batch_rows:
            raise ValueError(
                f"{cache.path}: {len(rows)} train rows do not fill one batch of "
                f"data.batch_rows = {config.batch_rows}; capture more text or use smaller batches"
            )
        self.fingerprint = _fingerprint(rows, cache, config)
        self._iterator = iter(_dataset(rows, cache, config, signals, here))

    def next(self) -> dict[str, np.ndarray]:
        """The next batch, usually read already."""
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """Position after the batches taken so far, with what it is a position in."""
        return {"position": self._iterator.get_state(), "fingerprint": self.fingerprint}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a saved position. ValueError if it is one in other data."""
        saved = state["fingerprint"]
        if saved != self.fingerprint:
            differences = [
                f"{name}: saved {saved.get(name)!r}, now {now!r}"
                for name, now in self.fingerprint.items()
                if saved.get(name) != now
            ]
            raise ValueError(
                "this data position is one in other data and would continue elsewhere: "
                + "; ".join(differences)
            )
        self._iterator.set_state(state["position"])

    def close(self) -> None:
        """Stop reading ahead."""
        self._iterator.close()


def updates(cache: Cache, *, config: Data) -> int:
    """How many updates a run makes: `steps`, or as many whole batches as `epochs` hold."""
    if config.steps is not None:
        return config.steps
    return config.epochs * len(cache.rows(split="train")) // config.batch_rows


def _dataset(
    rows: np.ndarray,
    cache: Cache,
    config: Data,
    signals: Sequence[str],
    here: np.ndarray | None,
) -> grain.IterDataset:
    numbers = grain.MapDataset.source(rows.tolist()).shuffle(seed=config.seed).repeat(EPOCHS)
    # One reader thread: numbers are free, and a batch is one vectorised read behind it.
    batches = numbers.batch(config.batch_rows).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    )

    def read(numbers: np.ndarray) -> dict[str, np.ndarray]:
        # As stored: a byte a number crosses to the device, not four.
        mine = numbers if here is None else numbers[here]
        found = cache.read(mine, signals=("logits", *signals), decode=False)
        return {"rows": numbers, **found}

    return grain.experimental.ThreadPrefetchIterDataset(
        batches.map(read), prefetch_buffer_size=BATCHES_AHEAD
    )


def _fingerprint(rows: np.ndarray, cache: Cache, config: Data) -> dict[str, Any]:
    return {
        "seed": config.seed,
        "batch_rows": config.batch_rows,
        "train_rows": len(rows),
        "numbers": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16],
        "rows_id": cache.manifest.rows_id,
    }
