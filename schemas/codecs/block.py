"""What an encoded field is (`Block`) and the frozen statistics it may need (`Tables`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from decant.schemas.disk.frames import Block

__all__ = ["DRAWS", "TAIL", "TOPK", "Block", "Tables"]

TOPK = 1
"""Field id: top-k ids and their log-probabilities, jointly."""
TAIL = 2
"""Field id: the tail's log-mass at the six nodes β > 0."""
DRAWS = 3
"""Field id: draws from the tail."""


@dataclass(frozen=True, eq=False)
class Tables:
    """Statistics of the corpus, frozen by calibration, that encoder and decoder share."""

    by_name: Mapping[str, np.ndarray]
    _memo: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Tables":
        """The tables that `arrays()` gave."""
        return cls(dict(arrays))

    def arrays(self) -> dict[str, np.ndarray]:
        """What has to be stored, by name."""
        return dict(self.by_name)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.by_name:
            raise ValueError(
                f"codec tables hold {sorted(self.by_name)} but {name!r} is needed; "
                f"these are the tables of another profile. Use the ones frozen with the cache."
            )
        return self.by_name[name]

    def compute_once(self, name: str, build: Callable[["Tables"], Any]) -> Any:
        """`build(self)`, computed once: tables are small on disk and expand in memory."""
        if name not in self._memo:
            self._memo[name] = build(self)
        return self._memo[name]
