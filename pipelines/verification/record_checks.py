"""Checks one row's records of `logits`, `counts` and `sketch`, which belong together."""

from collections.abc import Iterator, Mapping

import numpy as np

from decant.schemas.disk.layout import LOGITS, SKETCH
from decant.schemas.manifest.manifest import Manifest, Part
from decant.schemas.reading.record_signals import COMPANIONS, RecordSignals
from decant.schemas.records.companion import open_companion
from decant.schemas.records.logits import LogitsRecord, decode_logits, open_logits
from decant.schemas.records.rows import Row
from decant.schemas.targets.targets import Targets

Error = tuple[str, str, str]
"""The signal, what was expected, and what was got."""


class RecordChecks:
    """Checks the records of one part, which `reader` decodes."""

    def __init__(self, reader: RecordSignals, part: Part, sealed: Manifest):
        self.reader = reader
        self.part = part
        self.sealed = sealed

    def have_statistics(self) -> bool:
        """Whether the statistics that decoding needs are undamaged."""
        try:
            for name in (LOGITS, *COMPANIONS):
                if name in self.part.signals:
                    self.reader.tables(self.part, name)
            if SKETCH in self.part.signals:
                self.reader.heads.deviations(self.part)
        except ValueError:
            return False
        return True

    def errors(self, records: Mapping[str, bytes], row: Row, *, skipped: bool) -> Iterator[Error]:
        """What is wrong with a row's `records`, by signal. `skipped`: some signal gave NaN."""
        if LOGITS not in records:
            return
        length, vocabulary = self.sealed.sequence_length, self.sealed.vocabulary_size
        try:
            logits = open_logits(records[LOGITS], where="", length=length, spec=self.part.logits)
            tables = self.reader.tables(self.part, LOGITS)
            ids = vocabulary + self.part.logits.unmatched
            targets = decode_logits([logits], tables=tables, vocabulary=ids)
        except ValueError as error:
            yield LOGITS, "a record of logits", _message(error)
            return
        yield from _key_errors(LOGITS, row, logits.row_key)
        # A row that gave NaN has no targets; if only a signal that was added later gave NaN, the
        # row keeps its targets.
        without = skipped and not logits.positions
        # In an aligned part some positions have a label alone.
        expected = row.loss_mask if self.part.aligned is None else logits.scored & row.loss_mask
        if not without and not np.array_equal(logits.scored, expected):
            expected = f"targets at {int(row.loss_mask.sum())} positions"
            yield LOGITS, expected, f"{logits.positions}, or others"
        for name in COMPANIONS:
            if name in records:
                yield from self._companion_errors(
                    name, records[name], row, logits, targets, skipped=skipped
                )

    def _companion_errors(
        self,
        name: str,
        data: bytes,
        row: Row,
        logits: LogitsRecord,
        targets: Targets,
        *,
        skipped: bool,
    ) -> Iterator[Error]:
        try:
            record = open_companion(data, kind=COMPANIONS[name], where="", scored=logits.positions)
            if errors := list(_key_errors(name, row, record.row_key)):
                yield from errors
                return  # it belongs to another head
            if record.positions:
                self.reader.decode(name, self.part, [record], head=targets)
        except ValueError as error:
            yield name, f"a record of {name}", _message(error)
            return
        if record.positions != logits.positions and not skipped:
            yield name, f"{logits.positions} positions", f"{record.positions}"


def _message(error: ValueError) -> str:
    return str(error).removeprefix(": ")  # the record's name, which is empty here


def _key_errors(name: str, row: Row, key: bytes) -> Iterator[Error]:
    if key != row.key:
        yield name, f"row key {row.key.hex()}", f"{key.hex()}, of another row"
