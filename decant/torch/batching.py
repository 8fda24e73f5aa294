"""Batches of a cache's rows in an order that depends on the seed alone, for a loop of one's own."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from decant.schemas import Cache
from decant.torch.rows import Batch, Rows


def batches(
    cache: Cache | str | Path,
    *,
    batch_rows: int = 2,
    epochs: int | None = 1,
    seed: int = 0,
    signals: str | Sequence[str] = (),
    targets: Collection[str] | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    workers: int = 0,
    pin_memory: bool = False,
) -> Batches:
    """Batches of a sealed cache's train rows on the CPU, in an order that depends on `seed` alone.

    ```python
    for batch in decant.torch.batches("runs/cache", batch_rows=8, epochs=3):
        batch = batch.to("cuda")
        loss = decant.torch.loss_on_logits(student(batch["tokens"]), batch)
    ```

    Args:
        cache: an open cache, or the path of one.
        batch_rows: rows of every batch, over all ranks; rows left over after all epochs are left
            out.
        epochs: passes over the rows, each in its own order. None: batches never end.
        seed: seed of the order. It is not the order of `decant.batches`, which Grain makes.
        signals: also read these, such as `hidden/12`; `cache.manifest.signals` lists what there is.
        targets: which of `draws`, `labels`, `counts` and `sketch` to read beside the top-k; None:
            what there is. A loss reads one of them at most, and reading takes time.
        rank, world_size: this process among those that share every batch. None: those of
            torch.distributed, if it is initialised, or else one process.
        workers: processes that read ahead; they are spawned. 0: this process reads.
        pin_memory: as for `torch.utils.data.DataLoader`.

    ValueError if the cache holds no targets or lacks a signal, if the rows do not fill one batch,
    or if `world_size` does not divide `batch_rows`.
    """
    rows = Rows(cache, signals=signals, targets=targets)
    loading = {"num_workers": workers, "pin_memory": pin_memory}
    if workers:  # A forked worker dies if this process has TensorStore's threads.
        loading |= {"multiprocessing_context": "spawn"}
    return Batches(
        rows,
        batch_rows=batch_rows,
        epochs=epochs,
        seed=seed,
        share=_share(rank, world_size),
        loading=loading,
    )


class Batches:
    """The batches of `batches`. Iterating goes on where the last iteration stopped.

    `state_dict` and `load_state_dict` save and restore the place, as for a model or optimiser.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        batch_rows: int,
        epochs: int | None,
        seed: int,
        share: tuple[int, int],
        loading: dict[str, Any],
    ):
        """`share` is (rank, world size); `loading` are arguments of the DataLoader."""
        if batch_rows < 1:
            raise ValueError(f"batch_rows is {batch_rows}; expected at least 1")
        if batch_rows % share[1]:
            raise ValueError(
                f"batch_rows is {batch_rows}, which {share[1]} processes cannot share evenly; "
                f"use a multiple of {share[1]}"
            )
        if len(rows) * (epochs or 1) < batch_rows:
            raise ValueError(
                f"{rows.cache.path}: {len(rows)} train rows do not fill one batch of "
                f"batch_rows = {batch_rows}; use a smaller batch, or capture more text"
            )
        self.rows, self._batch_rows, self._epochs, self._seed = rows, batch_rows, epochs, seed
        self._share, self._loading = share, loading
        self._taken = 0

    def __len__(self) -> int:
        """Batches of all epochs, those already taken included. TypeError if they never end."""
        if self._epochs is None:
            raise TypeError("these batches never end, because epochs is None")
        return self._epochs * len(self.rows) // self._batch_rows

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self.rows,
            batch_size=None,
            sampler=_Order(self._numbers()),
            **self._loading,
        )
        for batch in loader:
            self._taken += self._batch_rows
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place after the batches taken so far, with a fingerprint of rows and order."""
        return {"taken": self._taken, "fingerprint": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place. Another `batch_rows` or `world_size` goes on at the next row.

        ValueError, naming what differs, if the place belongs to other rows or another order.
        """
        ours, saved = self._fingerprint(), state["fingerprint"]
        differing = [
            f"{name} was {saved.get(name)!r} and is {ours[name]!r}"
            for name in ours
            if saved.get(name) != ours[name]
        ]
        if differing:
            raise ValueError(
                "this place belongs to other data, where it would give other rows: "
                + "; ".join(differing)
            )
        self._taken = state["taken"]

    def _fingerprint(self) -> dict[str, Any]:
        return {"seed": self._seed, **fingerprint(self.rows)}

    def _numbers(self) -> Iterator[list[int]]:
        """This process's share of every batch that is left, as indices of `rows`."""
        rank, world_size = self._share
        count, start = len(self.rows), self._taken
        epoch, order = -1, np.zeros(0, np.int64)
        while self._epochs is None or start + self._batch_rows <= self._epochs * count:
            batch = []
            for at in range(start + rank, start + self._batch_rows, world_size):
                if at // count != epoch:
                    epoch = at // count
                    order = self._order(epoch)
                batch.append(int(order[at % count]))
            yield batch
            start += self._batch_rows

    def _order(self, epoch: int) -> np.ndarray:
        # Raw bits, because numpy may change the permutations of a seed between its versions.
        bits = np.random.PCG64([self._seed % 2**64, epoch]).random_raw(len(self.rows))
        return np.argsort(bits, kind="stable")


def fingerprint(rows: Rows) -> dict[str, Any]:
    """What decides which row a number means."""
    return {
        "rows": len(rows),
        "numbers": hashlib.sha256(rows.numbers.astype("<i8").tobytes()).hexdigest()[:16],
        "rows_id": rows.cache.manifest.rows_id,
    }


class _Order(torch.utils.data.Sampler):
    """An iterator of index lists as the sampler of a DataLoader."""

    def __init__(self, numbers: Iterator[list[int]]):
        self._numbers = numbers

    def __iter__(self) -> Iterator[list[int]]:
        return self._numbers


def _share(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError("rank and world_size belong together: give both or neither")
    if rank is not None and world_size is not None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, expected 0 to {world_size - 1}")
        return rank, world_size
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
