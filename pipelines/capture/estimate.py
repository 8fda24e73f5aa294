"""What a capture will take, measured on a little of it before anything runs.

Some of the corpus's own shards are tokenised, and a few random rows of them go through calibration
and capture as they are, in a temporary directory; the rest is scaling up. Nothing is written to
the output.
"""

import dataclasses
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from decant.pipelines.calibration.calibrate import calibrate
from decant.pipelines.capture.job import Capture
from decant.pipelines.capture.part import PartCapture
from decant.pipelines.capture.portions import Portion
from decant.pipelines.capture.unit import capture_unit
from decant.pipelines.config import Precompute
from decant.pipelines.rows.sources import InputShard, cut_shards
from decant.pipelines.rows.tokenise import tokenise_here
from decant.pipelines.teacher.batch_size import bytes_needed, default_batch_rows, device_bytes
from decant.pipelines.teacher.inference import Asked
from decant.schemas.arrays.spec import ArraySpec
from decant.schemas.disk.array_record import RecordReaders, write_records
from decant.schemas.disk.layout import LOGITS, ROWS, PartLayout, part_layout
from decant.schemas.manifest.commits import load_commit
from decant.schemas.manifest.manifest import Unit
from decant.schemas.manifest.plan import Plan, PlannedRows, read_plan
from decant.schemas.reading.units import read_unit_rows
from decant.schemas.records.rows import encode_row
from decant.schemas.signals import LogitsSignal

_TOKENISED_BYTES = 8 << 20
"""Of the corpus, at least, if it has as many; whole shards."""
_MEASURED_TOKENS = 4096
"""In batches that are full, two at least."""
_CALIBRATED_TOKENS = 4096
_WRITTEN_ROWS = 128
"""Rows of a file that is written to see its size; larger ones grow with their rows."""
_WRITER_SHARDS = 6
"""What an ArrayWriter holds, in files before compression."""


@dataclass(frozen=True)
class SignalCost:
    """What one signal takes, commits aside."""

    files: int
    bytes: int


@dataclass
class Estimate:
    """Everything that a capture will come to."""

    sources: int
    source_bytes: int
    tokenised_bytes: int
    """Of the sources: what rows and tokens are scaled up from."""
    rows: int
    heldout_rows: int
    tokens: int
    scored: int
    units: int
    unit_rows: int
    signals: dict[str, SignalCost] = field(default_factory=dict)
    """`rows` is one of them."""
    files: int = 0
    """With commits and what a cache has once."""
    bytes: int = 0
    measured_rows: int = 0
    tokens_a_second: float = 0.0
    """Of the capture on this machine, encoding and writing included."""
    tokenise_hours: float = 0.0
    capture_hours: float = 0.0
    batch_rows: int = 0
    device_bytes: int = 0
    """Of each device, by the compiler's account."""
    device_has: int = 0
    host_bytes: int = 0
    """Largest resident size of this process, which ran a few batches, and what a full unit adds."""
    host_has: int = 0
    disk_free: int = 0
    problems: list[str] = field(default_factory=list)
    """Why it will not fit; empty if it will."""


def estimate(config: Precompute, *, console: Console) -> Estimate:
    """Measure on a sample and scale up. Errors of input as `precompute`'s."""
    with tempfile.TemporaryDirectory(prefix="decant-plan-") as scratch:
        part = _to_come(config, Path(scratch) / "cache", console)
        part.teacher.write_reading_aids(part.cache)
        return _Measuring(part, config.output).run()


def _to_come(config: Precompute, scratch: Path, console: Console) -> PartCapture:
    """The files that are not captured yet as one part in `scratch`; all if there are none."""
    capture = Capture(config, console)
    left = [part for part in capture.parts if not part.portion.complete] or capture.parts
    sources = tuple(source for part in left for source in part.sources)
    layout = part_layout(scratch, 0)
    return PartCapture(
        dataclasses.replace(config, output=scratch),
        Portion(0, layout, sources, older=(), begun=False, complete=False),
        teacher=capture.teacher,
        before=[] if left[0] is capture.parts[0] else capture.parts[:1],
        console=console,
    )


class _Measuring:
    """One estimate, in the order of a capture."""

    def __init__(self, capture: PartCapture, output: Path):
        self.capture = capture
        self.output = output
        self.layout = capture.layout
        self.length = capture.config.corpus.sequence_length

    def run(self) -> Estimate:
        """Tokenise some, measure a few rows, scale up."""
        began = time.monotonic()
        shards, chosen, planned = self._tokenised()
        seconds = time.monotonic() - began
        total, share = sum(map(_bytes, shards)), sum(map(_bytes, chosen))
        scale = total / share
        units = planned.units
        found = Estimate(
            sources=len(self.capture.sources),
            source_bytes=total,
            tokenised_bytes=share,
            rows=round(scale * sum(unit.rows for unit in units)),
            heldout_rows=round(scale * sum(u.rows for u in units if u.split == "heldout")),
            tokens=round(scale * sum(unit.tokens for unit in units)),
            scored=round(scale * sum(unit.scored for unit in units)),
            units=round(len(units) * len(shards) / len(chosen)),
            unit_rows=planned.unit_rows,
        )
        found.tokenise_hours = seconds * scale / 3600
        measured = _Measured(self.capture, planned)
        measured.run()
        measured.into(found, units)
        self._judge(found)
        return found

    def _tokenised(self) -> tuple[list[InputShard], list[InputShard], PlannedRows]:
        """All shards, those that were tokenised, and what came of them."""
        job = self.capture.tokenise_job()
        shards = cut_shards(job.sources, shard_bytes=job.shard_bytes)
        wanted, chosen, total = _TOKENISED_BYTES, [], 0
        # Spread over the corpus, whose files are often in some order.
        steps = np.random.default_rng(0).permutation(len(shards))
        for number in steps.tolist():
            if chosen and total >= wanted:
                break
            chosen.append(shards[number])
            total += _bytes(shards[number])
        chosen.sort(key=lambda shard: shard.number)
        return shards, chosen, tokenise_here(job, chosen)

    def _judge(self, found: Estimate) -> None:
        found.disk_free = shutil.disk_usage(_there(self.output)).free
        found.device_has = device_bytes()
        found.host_has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for what, needed, has in (
            (f"free on the disk of {self.output}", found.bytes, found.disk_free),
            ("each device's memory", found.device_bytes, found.device_has),
            ("this host's memory", found.host_bytes, found.host_has),
        ):
            if needed > has:
                sizes = f"{has / 1e9:,.2f} GB, the capture takes about {needed / 1e9:,.2f} GB"
                found.problems.append(f"{what}: {sizes}")


class _Measured:
    """A few rows captured as the real ones will be, in units of a batch."""

    def __init__(self, capture: PartCapture, planned: PlannedRows):
        self.capture = capture
        self.planned = planned
        self.part = PartLayout(capture.cache / "measured")
        self.length = capture.config.corpus.sequence_length
        self.seconds = 0.0
        self.tokens = 0
        self.numbers: range = range(0)
        self.plan: Plan

    def run(self) -> None:
        """Calibrate on some rows and capture others, timed from the second batch on."""
        rows = self._rows()
        job = dataclasses.replace(self.capture.calibrate_job(rows), part=self.part.root)
        calibrate(job)
        self.plan = read_plan(self.part.plan)
        capture_unit(0, self.part.root, self.part.plan)  # programs are compiled now
        for name in self.plan.signals:
            self.part.commit(name, 0).unlink()
        began = time.monotonic()
        for number in self.numbers:
            capture_unit(number, self.part.root, self.part.plan)
        self.seconds = time.monotonic() - began
        self.tokens = sum(rows.units[number].tokens for number in self.numbers)

    def _rows(self) -> PlannedRows:
        """A part of random rows: first those that are measured, then those of the calibration."""
        batch = self.capture.config.teacher.batch_rows
        mesh = self.capture.config.teacher.mesh
        size = batch if isinstance(batch, int) else default_batch_rows(self.length, mesh=mesh)
        # Batches are filled inside a unit: where units are smaller, the rest is padding.
        batches = max(2, -(-_MEASURED_TOKENS // (size * self.length)))
        size = min(size, self.planned.unit_rows)
        places = self.planned.sample
        # The smallest keys calibrate, in the real capture too; others are measured if there are.
        calibrated = -(-_CALIBRATED_TOKENS // self.length)
        wanted = batches * size
        others = places[calibrated : calibrated + wanted] or places[:wanted]
        measured = self._units(others, size, first=0)
        self.numbers = range(len(measured))
        sample = places[:calibrated]
        units = measured + self._units(sample, size, first=len(measured))
        # Calibration reads the rows behind the measured ones.
        at = [(len(measured) + i // size, i % size) for i in range(len(sample))]
        unit_rows = 1 << (size - 1).bit_length()
        return dataclasses.replace(
            self.planned, unit_rows=unit_rows, units=tuple(units), sample=tuple(at)
        )

    def _units(self, places: Sequence[tuple[int, int]], size: int, *, first: int) -> list[Unit]:
        layout, units = self.capture.layout, []
        for at in range(0, len(places), size):
            rows = [
                read_unit_rows(layout.root, n, self.planned.units[n], offsets=[offset])[0]
                for n, offset in places[at : at + size]
            ]
            path = self.part.records(ROWS, first + len(units))
            entry = write_records(path, [encode_row(row) for row in rows])
            tokens = int(sum((row.segment_ids > 0).sum() for row in rows))
            scored = int(sum(row.loss_mask.sum() for row in rows))
            units.append(Unit("train", len(rows), tokens, scored, {ROWS: entry}))
        return units

    def into(self, found: Estimate, units: Sequence[Unit]) -> None:
        """Scale what was measured up to the corpus, of which `units` were tokenised."""
        rows = sum(unit.rows for unit in units)
        scale = found.rows / rows
        for name in (ROWS, LOGITS):
            sizes = _FileSizes(self._records(name), self.part.work)
            size = sum(map(sizes.of, (unit.rows for unit in units)))
            found.signals[name] = SignalCost(found.units, round(size * scale))
        host = 0
        for name, specs in self._specs(found).items():
            size, of = 0, 0
            for number in self.numbers:
                size += load_commit(self.part.commit(name, number)).file.bytes
                of += self.plan.rows.units[number].scored
            files = sum(
                math.ceil(unit.rows / spec.shard_rows) * len(spec.shard_names(0))
                for spec in specs.values()
                for unit in units
            )
            scored = sum(unit.scored for unit in units)
            cost = SignalCost(round(files * scale), round(size / of * scored * scale))
            found.signals[name] = cost
            host += sum(
                _WRITER_SHARDS * math.prod(s.shard) * s.numpy_dtype.itemsize for s in specs.values()
            )
        commits = found.units * len(self.plan.signals)
        once = len(self.plan.statistics) + 8
        found.files = sum(cost.files for cost in found.signals.values()) + commits + once
        found.bytes = sum(cost.bytes for cost in found.signals.values()) + 1024 * commits
        found.measured_rows = sum(self.plan.rows.units[n].rows for n in self.numbers)
        found.tokens_a_second = self.tokens / self.seconds
        found.capture_hours = found.tokens / found.tokens_a_second / 3600
        self._memory(found, host + found.signals[LOGITS].bytes * found.unit_rows // found.rows)

    def _memory(self, found: Estimate, of_a_unit: int) -> None:
        teacher, logits = self.plan.teacher, self.plan.signals[LOGITS]
        assert isinstance(logits, LogitsSignal)
        # Its account first: what compiling takes is not what capturing takes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resident = peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
        found.batch_rows = teacher.batch_rows
        found.device_bytes = bytes_needed(teacher, Asked(logits.target_spec, self.plan.arrays))
        on_host = found.device_bytes if jax.default_backend() == "cpu" else 0
        found.host_bytes = max(resident, on_host) + of_a_unit

    def _records(self, name: str) -> list[bytes]:
        """All measured records of a signal."""
        records = []
        for number in self.numbers:
            unit = self.plan.rows.units[number]
            entry = (
                unit.files[ROWS]
                if name == ROWS
                else load_commit(self.part.commit(name, number)).file
            )
            path = self.part.records(name, number)
            records += RecordReaders().read(path, range(entry.records), expected=entry)
        return records

    def _specs(self, found: Estimate) -> dict[str, dict[str, ArraySpec]]:
        """The arrays as the real units will have them."""
        real = self.capture.arrays(unit_rows=found.unit_rows)
        rows = dataclasses.replace(self.plan.rows, unit_rows=found.unit_rows)
        plan = dataclasses.replace(self.plan, rows=rows, signals={**self.plan.signals, **real})
        return {name: plan.specs(name) for name in real}


class _FileSizes:
    """What an ArrayRecord file of n rows takes, padding of its blocks included: by writing one."""

    def __init__(self, records: Sequence[bytes], directory: Path):
        self._records = records
        self._path = directory / "size.array_record"
        self._known: dict[int, float] = {}

    def of(self, rows: int) -> float:
        """Bytes of a file of that many rows like those that were measured."""
        written = min(rows, _WRITTEN_ROWS)
        if written not in self._known:
            found = [self._records[i % len(self._records)] for i in range(written)]
            self._known[written] = write_records(self._path, found).bytes
        return self._known[written] * rows / written


def _bytes(shard: InputShard) -> int:
    return sum(span.end - span.start for span in shard.spans)


def _there(path: Path) -> Path:
    """The nearest directory on the way to `path` that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def show(found: Estimate, console: Console) -> None:
    """The estimate for people."""
    console.print(
        f"{found.sources:,} files, {_size(found.source_bytes)} ({_size(found.tokenised_bytes)} "
        f"were tokenised): {found.rows:,} rows, {found.heldout_rows:,} of them held out, "
        f"{found.tokens:,} tokens, {found.units:,} units of {found.unit_rows:,} rows"
    )
    table = Table("signal", "files", "bytes", "a token", box=SIMPLE_HEAD)
    for name, cost in found.signals.items():
        each = f"{cost.bytes / found.tokens:,.1f}"
        table.add_row(name, f"{cost.files:,}", _size(cost.bytes), each)
    each = f"{found.bytes / found.tokens:,.1f}"
    table.add_row("with commits", f"{found.files:,}", _size(found.bytes), each)
    console.print(table)
    console.print(
        f"tokenising {_time(found.tokenise_hours)}, capture {_time(found.capture_hours)} at "
        f"{found.tokens_a_second:,.0f} tokens/s, as {found.measured_rows} rows took here"
    )
    console.print(
        f"memory: batches of {found.batch_rows} rows take {_size(found.device_bytes)} of each "
        f"device's {_size(found.device_has)}; this host {_size(found.host_bytes)} of "
        f"{_size(found.host_has)}; disk free: {_size(found.disk_free)}"
    )
    for problem in found.problems:
        console.print(f"it will not fit: {problem}")


def _size(size: int) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 1e3:,.1f} kB"


def _time(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:,.1f} min"
