"""Rows of a cache as a Dataset of tensors, which every DataLoader and sampler can read."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from decant.schemas import Cache, open_cache
from decant.schemas.records.rows import next_tokens

_INDICES = ("tokens", "labels", "segment_ids", "positions")
"""Arrays that torch's embeddings and cross-entropy take as int64."""


class Batch(dict[str, torch.Tensor]):
    """Tensors by name, with a row a sequence; see `Rows` for names and shapes. A dict.

    `vocabulary` is the number of token ids of the cache's tokenizer. A student may pad its logits
    with more columns, which the losses leave out. `highest_temperature` is the highest T that the
    cache's tail draws are made for; None if it holds none. `tail_at_1` says that the tail's mass is
    known at T = 1 only, as in a cache that was aligned from one without a sketch.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        vocabulary: int | None = None,
        highest_temperature: float | None = None,
        tail_at_1: bool = False,
    ):
        super().__init__(tensors)
        self.vocabulary, self.highest_temperature = vocabulary, highest_temperature
        self.tail_at_1 = tail_at_1

    def __reduce__(self) -> tuple:
        # dict's own way calls __init__ without arguments.
        return _batch, (dict(self), *self._facts)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        moved = {name: x.to(device, non_blocking=non_blocking) for name, x in self.items()}
        return _batch(moved, *self._facts)

    def row(self, index: int) -> Batch:
        """One row, whose tensors lack the first axis."""
        return _batch({name: x[index] for name, x in self.items()}, *self._facts)

    @property
    def _facts(self) -> tuple[int | None, float | None, bool]:
        return self.vocabulary, self.highest_temperature, self.tail_at_1


def _batch(
    tensors: dict, vocabulary: int | None, highest: float | None, tail_at_1: bool = False
) -> Batch:
    return Batch(tensors, vocabulary=vocabulary, highest_temperature=highest, tail_at_1=tail_at_1)


class Rows(Dataset):
    """The rows of a split as a map-style Dataset.

    `rows[3]` holds the tensors of one row; `rows[[3, 5]]` a batch, whose rows are read at once.
    With S positions a row:

    - tokens, labels, segment_ids and positions, int64 [S]; loss_mask, bool [S]. `labels` are the
      next tokens. They count only where loss_mask is True.
    - topk_ids int32 and topk_logprobs float32 [S, k]; tail_logmass float32 [S, nodes].
      A position may have fewer than k ids; the others hold id 0 and −inf.
    - label_logprobs, float32 [S]: the teacher's log-probability of the label, unless the cache is
      older than release 0.10.
    - if the cache has rollouts: writer_logprobs, float32 [S]: the log-probability that the text's
      writer gave to the label; NaN where it wrote nothing.
    - from `decant align --targets matched`: unmatched_logprobs, float32 [S, k], of the teacher's
      tokens that the student lacks.
    - if the cache has counts: count_ids and counts, int32 [S, N].
    - if it has sketches: sketch, float32 [S, r]; and sketch_basis, int32, which tells the row's
      basis among those of `sketch_tables(cache.sketch_heads())`.
    - if the cache has tail draws: tail_ids int32, tail_logprobs and tail_logweights float32 [S, m].
    - for further `signals`: `hidden/12` [S, width] and `attention/3` [heads, S, S].

    `Cache.read` says what the numbers mean.

    ```python
    rows = decant.torch.Rows("runs/cache")
    loader = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True, num_workers=2)
    ```

    Forked workers open their own files. If this process has read hidden states or attention maps,
    or has imported TensorStore otherwise, a forked worker dies at once: such a loader needs
    `multiprocessing_context="spawn"`.
    """

    def __init__(
        self,
        cache: Cache | str | Path,
        *,
        split: Literal["train", "heldout"] = "train",
        signals: str | Sequence[str] = (),
        targets: Collection[str] | None = None,
    ):
        """`targets` of `draws`, `labels`, `counts` and `sketch` are read, as by `Cache.read`; None:
        all that the cache holds.

        ValueError if the cache holds no targets, lacks a signal, or has no rows of the split."""
        opened = open_cache(cache) if isinstance(cache, str | Path) else cache
        # A copy: its open files belong to this dataset alone.
        self._cache, self._process = copy.copy(opened), os.getpid()
        self.targets = targets
        asked = (signals,) if isinstance(signals, str) else tuple(signals)
        self.signals = tuple(dict.fromkeys(("logits", *asked)))
        self.split = split
        self._require()
        self.numbers = opened.rows(split=split)
        if not len(self.numbers):
            remedy = "; capture with a larger --corpus.heldout" if split == "heldout" else ""
            raise ValueError(f"{opened.path}: no {split} rows{remedy}")

    @property
    def cache(self) -> Cache:
        """The cache, with files that this process has opened."""
        if self._process != os.getpid():
            # A forked worker shares file positions and lacks the threads of its parent's readers.
            self._cache, self._process = copy.copy(self._cache), os.getpid()
        return self._cache

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int | Sequence[int] | np.ndarray | torch.Tensor) -> Batch:
        at = np.asarray(index)
        batch = self._read(self.numbers[np.atleast_1d(at)])
        return batch if at.ndim else batch.row(0)

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        """What a DataLoader calls for a batch: the rows are read at once."""
        batch = self[list(indices)]
        return [batch.row(i) for i in range(len(indices))]

    @property
    def vocabulary(self) -> int:
        """Token ids of the cache's tokenizer."""
        return self._cache.manifest.vocabulary_size

    @property
    def highest_temperature(self) -> float | None:
        """Highest T that the tail draws are made for; None if the cache holds none."""
        logits = self._cache.manifest.logits
        return 1 / min(logits.draw_betas) if logits.draws else None

    def _read(self, numbers: np.ndarray) -> Batch:
        arrays = self.cache.read(numbers, signals=self.signals, targets=self.targets)
        arrays["labels"] = next_tokens(arrays["tokens"])
        tensors = {name: _tensor(name, array) for name, array in arrays.items()}
        logits = self._cache.manifest.logits
        return _batch(tensors, self.vocabulary, self.highest_temperature, logits.tail_at_1)

    def _require(self) -> None:
        held = self._cache.manifest.signals
        if "logits" not in held:
            raise ValueError(
                f"{self._cache.path}: holds rows only (made by `decant tokenise`) and no teacher's "
                "targets. Capture them with `decant precompute`"
            )
        for name in self.signals:
            if name not in held:
                raise ValueError(
                    f"{self._cache.path}: no signal {name!r}; this cache holds {', '.join(held)}"
                )


def _tensor(name: str, array: np.ndarray) -> torch.Tensor:
    if name in _INDICES:
        return torch.from_numpy(array.astype(np.int64))
    if array.dtype.name == "bfloat16":  # numpy's type for it comes from ml_dtypes
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
