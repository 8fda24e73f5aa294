"""Documents that must never be read again: where a row holds them, and reading as if it did not.

What is forgotten stands in the manifest. Nothing of it leaves `Cache.read`: its positions are
padding without target, state or map. Other documents of the row keep their places.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from decant.schemas.disk.layout import LOGITS, ROWS
from decant.schemas.manifest.manifest import Part
from decant.schemas.records.padded import clear_targets
from decant.schemas.records.rows import PADDING, Row

_ROW = ("tokens", "segment_ids", "positions", "loss_mask")


class Forgetting:
    """What a part has forgotten, for looking up."""

    def __init__(self, part: Part):
        self._sources = np.array([f.source for f in part.forgotten if f.document is None], np.int64)
        self._documents = {(f.source, f.document) for f in part.forgotten}

    def segments(self, origins: np.ndarray) -> Bool[np.ndarray, " segments"]:
        """Which of a row's segments are of forgotten documents."""
        places = origins[:, :2].tolist()
        one_by_one = [(source, document) in self._documents for source, document in places]
        return np.array(one_by_one, bool) | np.isin(origins[:, 0], self._sources)

    def positions(self, row: Row) -> Bool[np.ndarray, " time"]:
        """Which positions of a row are."""
        gone = np.concatenate([[False], self.segments(row.origins)])
        return gone[row.segment_ids]


def is_wholly_forgotten(row: Row, forgotten: Bool[np.ndarray, " time"]) -> bool:
    """Whether all of the row that is not padding is forgotten."""
    return bool(forgotten[row.segment_ids != PADDING].all())


def erase(
    out: dict[str, np.ndarray], slot: int, forgotten: np.ndarray, *, signals: Sequence[str]
) -> None:
    """Clear the positions in what was read of these signals (or `rows`) for one row."""
    for name in signals:
        if name == ROWS:
            for field in _ROW:
                out[field][slot, forgotten] = 0
        elif name == LOGITS:
            clear_targets(out, slot * len(forgotten) + np.flatnonzero(forgotten))
        elif name.startswith("attention/"):
            # Keys of a segment are seen by its own queries alone.
            out[name][slot][:, forgotten] = 0
        else:
            out[name][slot, forgotten] = 0
