"""An encoded field (`Block`) and the frozen statistics that codecs share (`Tables`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from decant.schemas.disk.frames import Block

__all__ = ["COUNTS", "DRAWS", "LABELS", "SKETCH", "TAIL", "TOPK", "Block", "Tables"]

TOPK = 1
"""Field id: top-k ids with their log-probabilities."""
TAIL = 2
"""Field id: the tail's log-mass at the nodes β > 0."""
DRAWS = 3
"""Field id: tail draws."""
LABELS = 4
"""Field id: the log-probability of the text's next token."""
COUNTS = 5
"""Field id: ids and counts of equally spaced draws; in records of their own."""
SKETCH = 6
"""Field id: the sketch; in records of its own."""


@dataclass(frozen=True, eq=False)
class Tables:
    """Statistics of the corpus that calibration froze. Encoder and decoder both need them."""

    by_name: Mapping[str, np.ndarray]
    _memo: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Tables":
        """The tables from the result of `arrays`."""
        return cls(dict(arrays))

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays to store, by name."""
        return dict(self.by_name)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.by_name:
            raise ValueError(
                f"codec tables hold {sorted(self.by_name)}, but {name!r} is needed; these are the "
                "tables of another profile. Use the tables that were frozen with the cache."
            )
        return self.by_name[name]

    def compute_once(self, name: str, build: Callable[["Tables"], Any]) -> Any:
        """`build(self)`, cached under `name`. Tables are small on disk and expand in memory."""
        if name not in self._memo:
            self._memo[name] = build(self)
        return self._memo[name]
