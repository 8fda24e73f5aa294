"""A thread that fetches the rows of batches to come from buckets, in the order of their use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from decant.schemas import Cache
from decant.schemas.disk.layout import ROWS
from decant.store.mirrored_file import wait_for
from decant.trainer.data.block_order import BLOCK_ROWS, WINDOW_ROWS

_ROWS_AT_ONCE = 256
_MOST_ROWS = WINDOW_ROWS
_SHARE = 4
"""Rows that are fetched and not yet used take at most one in so many of the mirror's bytes."""
_PAUSE = 1.0
"""Seconds to wait after a failure, which the reader meets too."""

Fetch = Callable[[range], list[Future]]
"""Begins to fetch the batches of these numbers."""


class FetchAhead:
    """Runs ahead of the batches that `taken` counts, until `close`."""

    def __init__(self, fetch: Fetch, *, first: int, batch_rows: int, most_rows: int):
        """`first` is the number of the next batch, `most_rows` how many rows to be ahead."""
        self._fetch = fetch
        self._ahead = max(most_rows // batch_rows, 1)
        self._group = min(max(_ROWS_AT_ONCE // batch_rows, 1), self._ahead)
        self._taken, self._next, self._closed = first, first, False
        self._futures: list[Future] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="decant-fetch-ahead", daemon=True)
        self._thread.start()

    def taken(self) -> None:
        """One more batch is being used."""
        with self._changed:
            self._taken += 1
            self._changed.notify()

    def close(self) -> None:
        """Begin no more requests; wait for those under way."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._cancel()
        self._thread.join()

    def _cancel(self) -> None:
        for future in self._futures:
            future.cancel()

    def _run(self) -> None:
        group = 1  # the first batch waits for few requests
        while True:
            with self._changed:
                while not self._closed and self._next >= self._taken + self._ahead:
                    self._changed.wait()
                # What is already being read needs no fetching ahead.
                self._next = max(self._next, self._taken)
                if self._closed:
                    return
            try:
                self._futures = self._fetch(range(self._next, self._next + group))
                wait_for(self._futures)
            except (OSError, ValueError):
                # The reader has the same trouble, and says it.
                self._cancel()
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, timeout=_PAUSE)
            self._next += group
            group = min(2 * group, self._group)


def most_rows_ahead(caches: Sequence[Cache], *, signals: Sequence[str]) -> int:
    """How many rows may be fetched before they are used, by the sizes of rows and mirrors."""
    most = _MOST_ROWS
    for cache in caches:
        if cache.mirror:
            units = [unit for part in cache.manifest.parts for unit in part.units]
            names = {ROWS, *cache.manifest.signals} & {ROWS, "logits", "counts", "sketch", *signals}
            size = sum(unit.files[name].bytes for unit in units for name in names)
            row = size / max(sum(unit.rows for unit in units), 1)
            most = min(most, int(cache.mirror.most_bytes / _SHARE / max(row, 1)))
    return most


def holds_a_window(most_rows: int) -> bool:
    """Whether mirrors that allow `most_rows` ahead keep a window of blocks until it is used."""
    return _SHARE * most_rows >= WINDOW_ROWS


class WholeBlocks:
    """The blocks, as `BlockOrder` makes them of `rows`, that batches read from.

    Each is named once in a window, because successive batches read from the same ones.
    """

    def __init__(self, rows: np.ndarray):
        self._rows = rows
        self._window, self._named = -1, np.zeros(0, np.int64)

    def of(self, numbers: np.ndarray, *, position: int) -> np.ndarray:
        """All rows of the blocks in which `numbers` lie, without blocks named before.

        `position` is that of the batch's first row in the run.
        """
        if position // WINDOW_ROWS != self._window:
            self._window, self._named = position // WINDOW_ROWS, np.zeros(0, np.int64)
        at = np.minimum(np.searchsorted(self._rows, numbers), len(self._rows) - 1)
        blocks = np.setdiff1d(at[self._rows[at] == numbers] // BLOCK_ROWS, self._named)
        self._named = np.concatenate([self._named, blocks])
        inside = (blocks[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).ravel()
        return self._rows[inside[inside < len(self._rows)]]
