"""The pipeline at S = 128 with a simulated teacher: does any cost grow faster than the corpus?

    python -m benchmarks.scale [--rows 25000 50000 100000 200000]

Tokenising, planning, calibration, capture, codecs, files and sealing are real. Only the teacher's
forward pass is replaced: targets are looked up in a table. Each size runs in a process of its own.
Then manifests with `--units` units (those of the last capture, repeated) are opened, each in a new
process.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

LENGTH = 128
VOCABULARY = 512
UNIT_ROWS = 64
"""Smaller than `precompute` would choose (4,096), so that there are thousands of units."""
WORDS_A_DOCUMENT = 400


class SimulatedTeacher:
    """Stands in for decant.pipelines.teacher.loaded.LoadedTeacher: targets without a model."""

    def __init__(self, planned):
        from decant.schemas.targets.targets import Targets

        rng = np.random.default_rng(0)
        self.planned = planned
        ids = rng.permuted(np.tile(np.arange(VOCABULARY, dtype=np.int32), (4096, 1)), axis=1)
        self._ids = ids[:, :32]
        logits = -np.sort(rng.exponential(size=(4096, 32)).astype(np.float32), axis=1) - 0.5
        self._logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True)) - 0.05
        betas = np.arange(9, dtype=np.float32) / 8
        self._tail = np.log(VOCABULARY - 32) * (1 - betas) - 3 * betas
        self._targets = Targets
        _peak("tokenise")

    @contextlib.contextmanager
    def run(self, rows: Iterable, asked, *, observers: Sequence = ()) -> Iterator[Iterator]:
        """An output for each row; targets follow from a position's token and number."""
        yield self._outputs(rows, asked, observers)

    def _outputs(self, rows: Iterable, asked, observers: Sequence) -> Iterator:
        from decant.pipelines.teacher.outputs import RowOutput

        if not observers:
            _peak("calibrate")
        betas = [round(8 * beta) for beta in asked.targets.betas]
        for row in rows:
            at = (row.tokens * 7 + row.positions)[row.loss_mask] % 4096
            tail = np.tile(self._tail[betas], (len(at), 1))
            targets = self._targets(self._ids[at], self._logprobs[at], tail)
            yield RowOutput(True, targets, {})


def main() -> None:
    options = _arguments()
    if options.one:
        print(json.dumps(capture(options.one, Path(options.directory))))
        return
    if options.open:
        print(json.dumps(measure_opening(Path(options.open))))
        return
    columns = (
        "rows",
        "units",
        "seconds",
        "÷ linear",
        "CPU s",
        "÷ linear",
        "peak MB: tokenise, calibrate, capture",
    )
    captures = Table(*columns, title=f"captures, S = {LENGTH}, units of {UNIT_ROWS} rows")
    openings = Table("units", "manifest MB", "open s", "MB more than imports")
    first = None
    with tempfile.TemporaryDirectory() as directory:
        for rows in options.rows:
            place = f"{directory}/{rows}"
            measured = _in_process("--one", str(rows), "--directory", place)
            first = first or measured
            captures.add_row(*_columns(measured, first))
        for units in options.units:
            with_units(Path(place) / "cache", units)
            opening = _in_process("--open", f"{place}/cache")
            size = f"{opening['manifest'] / 1e6:.1f}"
            openings.add_row(
                f"{units:,}", size, f"{opening['seconds']:.2f}", f"{opening['peak'] / 1e6:.0f}"
            )
    console = Console(width=120)
    console.print(captures, openings)


def _columns(measured: dict, first: dict) -> list[str]:
    def linear(what: str) -> str:
        return f"{measured[what] / first[what] * first['rows'] / measured['rows']:.2f}"

    return [
        *(f"{measured['rows']:,}", f"{measured['units']:,}", f"{measured['seconds']:,.1f}"),
        *(linear("seconds"), f"{measured['cpu']:,.1f}", linear("cpu")),
        ", ".join(f"{peak / 1e6:,.0f}" for peak in measured["peaks"].values()),
    ]


def with_units(cache: Path, count: int) -> None:
    """Rewrite a sealed cache's manifest so that it lists `count` units, its own repeated."""
    from decant.schemas.disk.layout import MANIFEST
    from decant.schemas.manifest.manifest import read_manifest, write_manifest

    manifest = read_manifest(cache)
    (part,) = manifest.parts
    units = tuple(part.units[n % len(part.units)] for n in range(count))
    (cache / MANIFEST).unlink()
    write_manifest(cache, replace(manifest, parts=(replace(part, units=units),)), replaces=None)


def measure_opening(cache: Path) -> dict:
    """Seconds of opening a cache, and peak memory above that of imports."""
    from decant.schemas import open_cache

    resident, started = _status("VmRSS"), time.monotonic()
    open_cache(cache)
    seconds = time.monotonic() - started
    size = (cache / "manifest.json").stat().st_size
    return {"seconds": seconds, "peak": _status("VmHWM") - resident, "manifest": size}


PEAKS: dict[str, int] = {}
"""Peak memory in bytes, by step."""


def _peak(step: str) -> None:
    """Record the peak so far as this step's, unless the step has one; then reset the peak."""
    if step not in PEAKS:
        PEAKS[step] = _status("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")


def _status(what: str) -> int:
    """A line of /proc/self/status in bytes. (ru_maxrss would count the parent before exec.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))


def capture(rows: int, directory: Path) -> dict:
    """Run `precompute` over text of about `rows` rows; sizes, times and peaks without imports."""
    from decant.pipelines.capture import job as precompute
    from decant.pipelines.capture import step_inputs
    from decant.pipelines.teacher import loaded as teacher
    from tests.making.caches import tiny_settings, write_teacher

    write_teacher(directory / "teacher", vocabulary=VOCABULARY)
    write_text(directory / "corpus", rows=rows)
    teacher.LoadedTeacher = SimulatedTeacher
    precompute_settings = tiny_settings(
        directory, sequence_length=LENGTH, k=32, profile="fast", heldout=0.01, shard_bytes=1 << 21
    )
    config = replace(
        precompute_settings,
        corpus=replace(precompute_settings.corpus, files=(str(directory / "corpus" / "*.jsonl"),)),
        tokenise_workers=1,
    )
    step_inputs.choose_unit_rows = lambda *_, **__: UNIT_ROWS
    started, before = time.monotonic(), time.process_time()
    manifest = precompute.precompute(config)
    seconds, cpu = time.monotonic() - started, time.process_time() - before
    _peak("capture")
    units = manifest.parts[0].units
    return {
        "rows": sum(unit.rows for unit in units),
        "units": len(units),
        "seconds": seconds,
        "cpu": cpu,
        "peaks": PEAKS,
    }


def write_text(directory: Path, *, rows: int) -> None:
    """Write JSON lines of different random documents, 5,000 a file."""
    from tests.making.caches import WORDS

    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = np.array(WORDS)
    documents = rows * LENGTH // WORDS_A_DOCUMENT
    for first in range(0, documents, 5000):
        with (directory / f"text-{first:08d}.jsonl").open("w") as file:
            for chosen in rng.integers(len(words), size=(min(5000, documents - first), 400)):
                print(json.dumps({"text": " ".join(words[chosen])}), file=file)


def _in_process(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[25_000, 50_000, 100_000, 200_000])
    parser.add_argument("--units", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--open", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
