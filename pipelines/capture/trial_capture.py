"""The trial of `plan`: a few rows are calibrated and captured for real, timed and measured."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from decant.pipelines.calibration.calibrate import calibrate
from decant.pipelines.calibration.sample import ordered_places
from decant.pipelines.capture.step_inputs import calibrate_job
from decant.pipelines.capture.unit import capture_unit
from decant.pipelines.config import Precompute
from decant.pipelines.teacher.batch_size import default_batch_rows
from decant.pipelines.teacher.opened import OpenedTeacher
from decant.schemas.arrays.spec import ArraySpec
from decant.schemas.disk.array_record import RecordReaders, write_records
from decant.schemas.disk.layout import ROWS, PartLayout
from decant.schemas.manifest.commits import load_commit
from decant.schemas.manifest.manifest import Unit
from decant.schemas.manifest.plan import Plan, PlannedRows, read_plan
from decant.schemas.reading.units import read_unit_rows
from decant.schemas.records.rows import encode_row
from decant.schemas.signals import ArraySignal

_MEASURED_TOKENS = 4096
"""Tokens captured, in full batches, at least two."""
_CALIBRATED_TOKENS = 4096
_WRITTEN_ROWS = 128
"""Rows of the files that are written to see their size; larger files grow with their rows."""


class TrialCapture:
    """Captures rows of a tokenised sample in the scratch directory `part`, in units of a batch.

    `rows` are the sample's planned rows, whose files lie below the directory `rows_at`.
    """

    def __init__(
        self,
        config: Precompute,
        teacher: OpenedTeacher,
        rows: PlannedRows,
        *,
        rows_at: Path,
        part: PartLayout,
    ):
        self.part = part
        self.seconds = 0.0
        self.tokens = 0
        self.plan: Plan
        """The trial's own plan, after `run`."""
        self._config = config
        self._teacher = teacher
        self._sample = rows
        self._sample_root = rows_at
        self._length = config.corpus.sequence_length
        self._numbers = range(0)
        """Units that are captured; the others are for calibration."""

    @property
    def rows(self) -> int:
        """Number of rows captured."""
        return sum(self.plan.rows.units[n].rows for n in self._numbers)

    def run(self) -> None:
        """Calibrate on some rows, then capture others and measure the time."""
        rows = self._choose_rows()
        job = calibrate_job(
            self._config,
            self._teacher,
            rows,
            tokenizer=self._teacher.tokenizer.digest,
            part=self.part,
            known={},
        )
        calibrate(job)
        self.plan = read_plan(self.part.plan)
        capture_unit(0, self.part.root, self.part.plan)  # compiles the programs
        for name in self.plan.signals:
            self.part.commit(name, 0).unlink()
        began = time.monotonic()
        for number in self._numbers:
            capture_unit(number, self.part.root, self.part.plan)
        self.seconds = time.monotonic() - began
        self.tokens = sum(rows.units[number].tokens for number in self._numbers)

    def record_files_bytes(self, name: str, rows: Sequence[int]) -> float:
        """Bytes of files with so many `rows` each of a signal stored in records, or of `rows`."""
        sizes = _FileSizes(self._records(name), self.part.work)
        return sum(map(sizes.of, rows))

    def array_bytes_a_target(self, name: str) -> float:
        """Bytes of an array signal per position with a target."""
        size, scored = 0, 0
        for number in self._numbers:
            size += load_commit(self.part.commit(name, number)).file.bytes
            scored += self.plan.rows.units[number].scored
        return size / scored

    def specs(
        self, arrays: Mapping[str, ArraySignal], *, unit_rows: int
    ) -> dict[str, dict[str, ArraySpec]]:
        """Array specs by signal, for the `arrays` of real units of `unit_rows` rows."""
        rows = dataclasses.replace(self.plan.rows, unit_rows=unit_rows)
        plan = dataclasses.replace(self.plan, rows=rows, signals={**self.plan.signals, **arrays})
        return {name: plan.specs(name) for name in arrays}

    def _choose_rows(self) -> PlannedRows:
        """Write the trial's units: first the ones to capture, then the ones to calibrate on."""
        batch = self._config.teacher.batch_rows
        mesh = self._config.teacher.mesh
        size = batch if isinstance(batch, int) else default_batch_rows(self._length, mesh=mesh)
        # Batches never span units: if a unit is smaller than a batch, the rest is padding.
        batches = max(2, -(-_MEASURED_TOKENS // (size * self._length)))
        size = min(size, self._sample.unit_rows)
        places = ordered_places(self._sample)
        # The rows with the smallest keys calibrate, as in the real capture; if there are more rows,
        # others are captured.
        calibrated = -(-_CALIBRATED_TOKENS // self._length)
        wanted = batches * size
        others = places[calibrated : calibrated + wanted] or places[:wanted]
        measured = self._write_units(others, size, first=0)
        self._numbers = range(len(measured))
        sample = places[:calibrated]
        units = measured + self._write_units(sample, size, first=len(measured))
        sample_places = [(len(measured) + i // size, i % size) for i in range(len(sample))]
        unit_rows = 1 << (size - 1).bit_length()
        return dataclasses.replace(
            self._sample, unit_rows=unit_rows, units=tuple(units), sample=tuple(sample_places)
        )

    def _write_units(
        self, places: Sequence[tuple[int, int]], size: int, *, first: int
    ) -> list[Unit]:
        """Copy the sample's rows at `places` into units of `size` rows, numbered from `first`."""
        units = []
        for at in range(0, len(places), size):
            rows = [
                read_unit_rows(
                    self._sample_root,
                    n,
                    self._sample.units[n],
                    length=self._length,
                    offsets=[offset],
                )[0]
                for n, offset in places[at : at + size]
            ]
            path = self.part.records(ROWS, first + len(units))
            entry = write_records(path, [encode_row(row) for row in rows])
            tokens = int(sum((row.segment_ids > 0).sum() for row in rows))
            scored = int(sum(row.loss_mask.sum() for row in rows))
            units.append(Unit("train", len(rows), tokens, scored, {ROWS: entry}))
        return units

    def _records(self, name: str) -> list[bytes]:
        """All captured records of a signal, or of `rows`."""
        records = []
        for number in self._numbers:
            entry = (
                self.plan.rows.units[number].files[ROWS]
                if name == ROWS
                else load_commit(self.part.commit(name, number)).file
            )
            path = self.part.records(name, number)
            records += RecordReaders().read(path, range(entry.records), expected=entry)
        return records


class _FileSizes:
    """Sizes of ArrayRecord files, padding of blocks included, found by writing files like them."""

    def __init__(self, records: Sequence[bytes], directory: Path):
        self._records = records
        self._path = directory / "size.array_record"
        self._sizes: dict[int, float] = {}

    def of(self, rows: int) -> float:
        """Bytes of a file of `rows` records like the captured ones."""
        written = min(rows, _WRITTEN_ROWS)
        if written not in self._sizes:
            records = [self._records[i % len(self._records)] for i in range(written)]
            self._sizes[written] = write_records(self._path, records).bytes
        return self._sizes[written] * rows / written
