"""A batch on the device: its arrays by name, and the facts of its cache that the losses check."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array


@dataclass(frozen=True)
class DeviceBatch(Mapping[str, Any]):
    """Arrays by name; each has a row a sequence. A pytree, so it can be an argument of `jax.jit`.

    tokens, labels, segment_ids and positions are int32 [rows, S] and loss_mask is bool [rows, S].
    `labels` are the tokens shifted by one; where loss_mask is False there is no label to learn.
    All other arrays are those of `Cache.read`, with hidden states and attention maps decoded.
    """

    arrays: dict[str, Any]
    vocabulary: int
    """Token ids of the cache's tokenizer. A student may pad its logits with more columns."""
    highest_temperature: float | None
    """Highest T that the tail draws are made for; None if the cache holds none."""
    tail_at_1: bool = False
    """The tail's mass is known at T = 1 only: the cache was aligned from one without a sketch."""

    def __getitem__(self, name: str) -> Any:
        if name in self.arrays:
            return self.arrays[name]
        raise KeyError(f"no array {name!r} in this batch; it holds {', '.join(self.arrays)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def replace(self, **arrays: Array) -> DeviceBatch:
        """The batch with other arrays, such as a `loss_mask` that leaves out more positions."""
        return dataclasses.replace(self, arrays={**self.arrays, **arrays})


jax.tree_util.register_dataclass(
    DeviceBatch,
    data_fields=["arrays"],
    meta_fields=["vocabulary", "highest_temperature", "tail_at_1"],
)
