"""The Beam step that captures every unit of a plan that has no commit yet, with a progress bar.

Only unit numbers travel through Beam; workers read the plan and write files and commits themselves.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import apache_beam as beam
from rich.console import Console

from decant.pipelines.calibration.companions import POSITIONS_A_NUMBER
from decant.pipelines.capture.progress import row_progress
from decant.pipelines.capture.teacher_lease import capture_on_host, release_lease, take_lease
from decant.pipelines.capture.unit import is_committed
from decant.pipelines.runners.run_pipeline import Build
from decant.schemas.arrays.spec import create_array
from decant.schemas.disk.layout import PartLayout
from decant.schemas.disk.stand_in import Travels, by_address, each_of, names_in
from decant.schemas.manifest.manifest import Unit
from decant.schemas.manifest.plan import Plan
from decant.schemas.signals import HiddenSignal, Signal, SketchSignal


class CaptureUnits(Travels, beam.DoFn):
    """Captures the units whose numbers it gets, of `part`, by the plan file at `plan`."""

    def __init__(self, part: Path, plan: Path):
        self._part, self._plan = part, plan

    def setup(self) -> None:
        """Take the host's lease if it is free, before another process starts to load a teacher."""
        take_lease(self._part)

    def process(self, number: int) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Capture a unit, here or in the process of this host that has the teacher."""
        with by_address(self._part):  # here: who hears the error may be on another machine
            capture_on_host(number, self._part, self._plan)


def capture_remaining(
    plan: Plan,
    path: Path,
    *,
    part: Path,
    run: Callable[[Build], None],
    console: Console,
    what: str = "capture",
    worker: beam.DoFn | None = None,
) -> None:
    """Capture every unit of `part` that lacks a commit of one of the plan's signals.

    `plan` is the content of the file at `path`, which workers read. `run` runs a Beam pipeline.
    `worker` does a unit by its number (None: a teacher captures it), and `what` names that.
    """
    # Absolute, because workers may have another working directory.
    part, path, units = part.resolve(), path.resolve(), plan.rows.units
    rows, tokens = totals(units)
    committed = each_of(partial(is_committed, part, plan), range(len(units)), cache=part)
    done = {n for n, is_done in enumerate(committed) if is_done}
    todo = [n for n in range(len(units)) if n not in done]
    before = sum(units[n].rows for n in done)
    if done:
        console.print(f"{what}: {len(done)} of {len(units)} units ({before} rows) are done already")
    if not todo:
        return
    _create_arrays(plan, part)
    for line in kept_variances(plan.signals):
        console.print(line)
    layout = PartLayout(part)
    commits = {n: {layout.commit(name, n).name for name in plan.signals} for n in todo}

    def finished_units() -> list[int]:
        # One listing of the directory: one query per unit would keep a core busy at 10,000 units.
        present = names_in(layout.commits, ".json")
        return [n for n in todo if commits[n] <= present]

    def committed_rows() -> int:
        return before + sum(units[n].rows for n in finished_units())

    try:
        with row_progress(
            what,
            rows=rows,
            tokens=tokens,
            console=console,
            before=before,
            committed=committed_rows,
            part=part,
        ):
            run(
                lambda pipeline: (
                    pipeline
                    | beam.Create(todo)
                    | beam.Reshuffle()
                    | what.capitalize() >> beam.ParDo(worker or CaptureUnits(part, path))
                )
            )
    except KeyboardInterrupt as stop:
        count = len(done) + len(finished_units())
        raise KeyboardInterrupt(f"{count} of {len(units)} units are done") from stop
    finally:
        release_lease(part)  # this process has it if the runner works in this process


def totals(units: Sequence[Unit]) -> tuple[int, int]:
    """Rows and tokens of `units`."""
    return sum(unit.rows for unit in units), sum(unit.tokens for unit in units)


def _create_arrays(plan: Plan, part: Path) -> None:
    for name in plan.arrays:
        for array, spec in plan.specs(name).items():
            create_array(PartLayout(part).array(array), spec)


def kept_variances(signals: Mapping[str, Signal]) -> Iterator[str]:
    """A line on each signal that keeps a part of the states' variance."""
    for name, signal in signals.items():
        if isinstance(signal, HiddenSignal) and signal.directions:
            yield (
                f"{name}: {signal.width} of {signal.teacher_width} directions keep "
                f"{signal.variance_kept:.1%} of the variance"
            )
        if isinstance(signal, SketchSignal):
            yield (
                f"{name}: {signal.rank} numbers a position keep {signal.variance_kept:.1%} of the "
                "variance of the logits at T = 2"
            )
            if signal.asked_rank:
                needed = signal.asked_rank * POSITIONS_A_NUMBER
                yield (
                    f"{name}: these are fewer than {signal.asked_rank}, which need {needed:,} "
                    "calibration positions; the sample has fewer. A larger corpus gives more"
                )
