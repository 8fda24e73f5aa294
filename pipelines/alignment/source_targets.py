"""The other cache's targets at any of its positions; rows are read once and kept for a while."""

from collections import OrderedDict
from collections.abc import Collection

import numpy as np

from decant.schemas import Cache

_MOST_BYTES = 256 << 20


class SourceTargets:
    """Reads positions of `cache`, counted as in `AlignedRow.source`."""

    def __init__(self, cache: Cache, *, targets: Collection[str]):
        self._cache, self._targets = cache, tuple(targets)
        self._kept: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()

    def at(self, positions: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The rows that hold the `positions`, as arrays [rows · S, …], and where each position is
        in them."""
        length = self._cache.manifest.sequence_length
        rows, slot = np.unique(positions // length, return_inverse=True)
        self._read([row for row in rows.tolist() if row not in self._kept])
        held = []
        for row in rows.tolist():
            self._kept.move_to_end(row)
            held.append(self._kept[row])
        arrays = {name: np.concatenate([row[name] for row in held]) for name in held[0]}
        self._drop(len(rows))
        return arrays, slot * length + positions % length

    def _read(self, rows: list[int]) -> None:
        if not rows:
            return
        batch = self._cache.read(rows, targets=self._targets)
        for slot, row in enumerate(rows):
            own = {name: np.array(array[slot]) for name, array in batch.items() if array.ndim > 1}
            if "sketch_basis" in batch:
                own["sketch_basis"] = np.full(len(own["tokens"]), batch["sketch_basis"][slot])
            self._kept[row] = own

    def _drop(self, used: int) -> None:
        each = sum(array.nbytes for array in next(iter(self._kept.values())).values())
        most = max(used, _MOST_BYTES // each)
        while len(self._kept) > most:
            self._kept.popitem(last=False)
