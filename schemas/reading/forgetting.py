"""Forgotten documents: find their positions in a row, and blank these when reading.

The manifest lists forgotten documents. `Cache.read` returns their positions as padding, without
target, state or map. Other documents of the row keep their positions.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from decant.schemas.disk.layout import RECORDS, ROWS
from decant.schemas.manifest.manifest import Part
from decant.schemas.reading.units import read_unit_rows
from decant.schemas.records.padded import clear_targets
from decant.schemas.records.rows import PADDING, ROW_FIELDS, WRITER_LOGPROBS, Row


class ForgottenDocuments:
    """Look-up of one part's forgotten documents."""

    def __init__(self, part: Part):
        self._sources = np.array([f.source for f in part.forgotten if f.document is None], np.int64)
        self._documents = {(f.source, f.document) for f in part.forgotten}

    def segments(self, origins: np.ndarray) -> Bool[np.ndarray, " segments"]:
        """Which segments belong to forgotten documents, from a row's `origins`."""
        places = origins[:, :2].tolist()
        one_by_one = [(source, document) in self._documents for source, document in places]
        return np.array(one_by_one, bool) | np.isin(origins[:, 0], self._sources)

    def positions(self, row: Row) -> Bool[np.ndarray, " time"]:
        """Which positions of a row belong to forgotten documents."""
        gone = np.concatenate([[False], self.segments(row.origins)])
        return gone[row.segment_ids]


def is_wholly_forgotten(row: Row, forgotten: Bool[np.ndarray, " time"]) -> bool:
    """Whether a row holds nothing but forgotten documents and padding.

    `forgotten` marks the positions of forgotten documents.
    """
    return bool(forgotten[row.segment_ids != PADDING].all())


def wholly_forgotten_rows(root: Path, part: Part, *, length: int) -> tuple[tuple[int, int], ...]:
    """(unit number, offset) of the rows of `part`, in directory `root`, that hold nothing else.

    Rows have `length` positions.
    """
    forgetting = ForgottenDocuments(part)
    return tuple(
        (number, offset)
        for number, unit in part.numbered_units
        for offset, row in enumerate(read_unit_rows(root, number, unit, length=length))
        if forgetting.positions(row).any() and is_wholly_forgotten(row, forgetting.positions(row))
    )


def erase(
    out: dict[str, np.ndarray], slot: int, forgotten: np.ndarray, *, signals: Sequence[str]
) -> None:
    """Clear the `forgotten` positions of row `slot` in the arrays of `Cache.read`, in place.

    `signals` names what to clear: signals, or `rows` for the row fields.
    """
    for name in signals:
        if name == ROWS:
            for field in ROW_FIELDS:
                out[field][slot, forgotten] = 0
            if WRITER_LOGPROBS in out:
                out[WRITER_LOGPROBS][slot, forgotten] = np.nan
        elif name in RECORDS:
            clear_targets(out, slot * len(forgotten) + np.flatnonzero(forgotten), signals=(name,))
        elif name.startswith("attention/"):
            # Clearing queries is enough: only queries of the same segment see a segment's keys.
            out[name][slot][:, forgotten] = 0
        else:
            out[name][slot, forgotten] = 0
