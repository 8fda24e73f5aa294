"""Batches for a loop of one's own: the trainer's rows in the trainer's order, on the device."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array

from decant.command_line.checks import check_values
from decant.models.mesh.sharding import place_rows, rows_of_process
from decant.schemas import Cache, open_cache
from decant.schemas.reading.held import held_by
from decant.schemas.records.rows import WRITER_LOGPROBS, next_tokens
from decant.schemas.signals import HiddenSignal, scale_name
from decant.schemas.targets.attention import decode_log
from decant.schemas.targets.hidden import decode_int8
from decant.trainer.config import Data
from decant.trainer.data.batches import Batches, number_of_updates
from decant.trainer.loss.batch_fields import TARGETS, check_targets
from decant.trainer.loss.settings import Loss
from decant.trainer.own_loop.batch import DeviceBatch


def batches(
    cache: Cache | str | Path,
    *,
    batch_rows: int = Data.batch_rows,
    epochs: int | None = Data.epochs,
    seed: int = Data.seed,
    shuffle: Literal["global", "blocks"] = Data.shuffle,
    signals: str | Sequence[str] = (),
    targets: Collection[str] | None = None,
    sharding: Sharding | None = None,
    position: Mapping[str, Any] | None = None,
) -> BatchIterator:
    """Batches of a sealed cache's train rows, as arrays on the device.

    Rows and their order are those of `decant train` with the same `batch_rows`, `seed` and
    `shuffle`. A thread reads two batches ahead.

    ```python
    for batch in decant.batches("runs/cache", batch_rows=8, epochs=3):
        logits = student(params, batch["tokens"], batch["segment_ids"], batch["positions"])
        loss = decant.loss_on_logits(logits, batch)
    ```

    Args:
        cache: an open cache, or the path of one.
        batch_rows: rows of every batch; the rows left over at the end of all epochs are left out.
        epochs: passes over the train rows, each in its own order. None: batches never end.
        seed: seed of the order.
        shuffle: `global`: each epoch is a permutation of all rows. `blocks`: reads stay in few
            blocks of 64 rows, for caches in a bucket or on a slow disk.
        signals: also read these, such as `hidden/12`; `cache.manifest.signals` lists what there is.
        targets: read only these of `draws`, `labels`, `counts` and `sketch` beside the top-k, to
            save time, such as `["counts"]` for `tail="counts"`, `["draws"]` for `"sampled"`,
            `["labels"]` for `divergence="on_policy"`. None: all that the cache holds.
        sharding: places rows on several devices or processes, such as
            `NamedSharding(mesh, PartitionSpec("data"))`. A process reads only its devices' rows.
            None: whole batches on JAX's default device.
        position: go on from here; see `BatchIterator.state`.

    ValueError if the cache holds no targets or lacks a signal, if its train rows do not fill one
    batch, or if `position` was saved with other rows, another order or another `batch_rows`.
    """
    cache = open_cache(cache) if isinstance(cache, str | Path) else cache
    check_targets(cache, loss=Loss())
    signals = (signals,) if isinstance(signals, str) else tuple(signals)
    if missing := [name for name in signals if name not in cache.manifest.signals]:
        held = ", ".join(cache.manifest.signals)
        raise ValueError(f"{cache.path}: no signal {missing[0]!r}; this cache holds {held}")
    # `epochs` has no None in the settings; a loop of one's own may be endless.
    passes = 1 if epochs is None else epochs
    config = Data(batch_rows=batch_rows, seed=seed, shuffle=shuffle, epochs=passes)
    check_values(config)
    # A copy, because the thread must not share open files with the caller.
    own = copy.copy(cache)
    iterator = BatchIterator(
        own,
        config,
        count=None if epochs is None else number_of_updates(own, config=config),
        signals=tuple(name for name in signals if "/" in name),
        targets=targets,
        sharding=sharding,
    )
    if position is not None:
        iterator.restore(position)
    return iterator


class BatchIterator(Iterator[DeviceBatch]):
    """The batches of `batches`. A `with` block, or `close`, stops its thread."""

    def __init__(
        self,
        cache: Cache,
        config: Data,
        *,
        count: int | None,
        signals: tuple[str, ...],
        targets: Collection[str] | None,
        sharding: Sharding | None,
    ):
        """`count` batches (None: endless), placed by `sharding` (None: on the default device)."""
        self._cache, self._rows, self._count = cache, config.batch_rows, count
        self._signals, self._sharding = signals, sharding
        here = None if sharding is None else rows_of_process(sharding, config.batch_rows)
        self._batches = Batches(cache, config=config, signals=signals, targets=targets, here=here)
        self._taken = 0

    def __next__(self) -> DeviceBatch:
        if self._taken == self._count:
            raise StopIteration
        batch = self._batches.next()
        self._taken += 1
        return self._on_device(batch)

    def __len__(self) -> int:
        """Batches of all epochs, those already taken included. TypeError if they never end."""
        if self._count is None:
            raise TypeError("these batches never end, because epochs is None")
        return self._count

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state(self) -> dict[str, Any]:
        """The position after the batches taken so far: a dict for JSON, to save with a checkpoint.

        `batches(…, position=state)` goes on with the next batch.
        """
        return {"taken": self._taken, **self._batches.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `state` returned. ValueError if it belongs to other data."""
        self._batches.restore(dict(state))
        self._taken = state["taken"]

    def close(self) -> None:
        """Stop reading ahead."""
        self._batches.close()

    def _on_device(self, batch: dict[str, np.ndarray]) -> DeviceBatch:
        held = [name for name in (*TARGETS, "label_logprobs", WRITER_LOGPROBS) if name in batch]
        arrays = {name: self._place(batch[name]) for name in held}
        arrays["labels"] = self._place(next_tokens(batch["tokens"]))
        arrays |= {name: self._decoded(name, batch) for name in self._signals}
        held = held_by([self._cache])
        return DeviceBatch(
            arrays,
            vocabulary=self._cache.manifest.vocabulary_size,
            highest_temperature=held.drawn_at,
            tail_at_1=held.tail_at_1,
        )

    def _place(self, rows: np.ndarray) -> Array:
        if self._sharding is None:
            return jnp.asarray(rows)
        return place_rows(rows, count=self._rows, sharding=self._sharding)

    def _decoded(self, name: str, batch: dict[str, np.ndarray]) -> Array:
        """A signal's numbers; stored codes are decoded on the device, to send fewer bytes to it."""
        signal, stored = self._cache.manifest.signals[name], self._place(batch[name])
        if isinstance(signal, HiddenSignal) and signal.dtype == "int8":
            return _decode_states(stored, self._place(batch[scale_name(name)]))
        return _decode_maps(stored) if stored.dtype == jnp.uint8 else stored


_decode_states = jax.jit(partial(decode_int8, xp=jnp))
_decode_maps = jax.jit(partial(decode_log, xp=jnp))
