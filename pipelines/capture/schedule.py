"""Capturing every unit of a plan that lacks a commit, through Beam, with progress."""

from collections.abc import Callable, Sequence
from pathlib import Path

import apache_beam as beam
from rich.console import Console

from decant.pipelines.capture.lease import CaptureUnits, leave
from decant.pipelines.capture.progress import capture_progress
from decant.pipelines.capture.unit import is_committed
from decant.pipelines.runners.run_pipeline import Build
from decant.schemas.arrays.spec import create_array
from decant.schemas.disk.layout import PartLayout
from decant.schemas.manifest.manifest import Unit
from decant.schemas.manifest.plan import Plan
from decant.schemas.signals import HiddenSignal


def capture_plan(
    plan: Plan, path: Path, *, part: Path, run: Callable[[Build], None], console: Console
) -> None:
    """Capture what the plan at `path` holds of `part`; only units and commits go through Beam."""
    # Workers may have another working directory.
    part, path, units = part.resolve(), path.resolve(), plan.rows.units
    rows, tokens = totals(units)
    done = {n for n in range(len(units)) if is_committed(part, plan, n)}
    todo = [n for n in range(len(units)) if n not in done]
    before = sum(units[n].rows for n in done)
    if done:
        console.print(
            f"capture: {len(done)} of {len(units)} units ({before} rows) are done already"
        )
    if not todo:
        return
    _create_arrays(plan, part, console=console)
    layout = PartLayout(part)
    commits = {n: {layout.commit(name, n).name for name in plan.signals} for n in todo}

    def finished() -> list[int]:
        # One look at the directory: of 10,000 units, asking for each would take a core.
        there = {path.name for path in layout.commits.glob("*.json")}
        return [n for n in todo if commits[n] <= there]

    def committed() -> int:
        return before + sum(units[n].rows for n in finished())

    try:
        with capture_progress(rows=rows, tokens=tokens, before=before, committed=committed):
            run(
                lambda pipeline: (
                    pipeline
                    | beam.Create(todo)
                    | beam.Reshuffle()
                    | "Capture" >> beam.ParDo(CaptureUnits(part, path))
                )
            )
    except KeyboardInterrupt as stop:
        there = len(done) + len(finished())
        raise KeyboardInterrupt(f"{there} of {len(units)} units are done") from stop
    finally:
        leave(part)  # where the runner works in this process


def totals(units: Sequence[Unit]) -> tuple[int, int]:
    """Rows and tokens of units."""
    return sum(unit.rows for unit in units), sum(unit.tokens for unit in units)


def _create_arrays(plan: Plan, part: Path, *, console: Console) -> None:
    for name, signal in plan.arrays.items():
        for array, spec in plan.specs(name).items():
            create_array(PartLayout(part).array(array), spec)
        if isinstance(signal, HiddenSignal) and signal.directions:
            console.print(
                f"{name}: {signal.width} of {signal.teacher_width} directions keep "
                f"{signal.variance_kept:.1%} of the variance"
            )
