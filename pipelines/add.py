"""Signals that a sealed cache gains: same rows and teacher, its files left as they are.

Readers have the old manifest until the new one takes its place. What is under way stands in a
plan of its own, so that a rerun goes on where it stopped.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import apache_beam as beam
from rich.console import Console

from pipelines.array_signals import least_bytes, settings
from pipelines.beam_runner import Build
from pipelines.calibrate import AddJob, calibrate_addition
from pipelines.capture_plan import capture_plan
from pipelines.host import with_teacher
from pipelines.seal import clean, seal_addition
from schemas.commits import read_commit
from schemas.identity import digest
from schemas.layout import PartLayout, part_layout
from schemas.manifest import Manifest, Unit
from schemas.plan import Plan, read_plan, with_teacher_at
from schemas.signals import ArraySignal, LogitsSignal


def not_held(
    asked: Mapping[str, ArraySignal], manifest: Manifest, *, cache: Path
) -> dict[str, ArraySignal]:
    """Those of `asked` that the cache lacks. ValueError if it holds one with other settings."""
    for name in asked.keys() & manifest.signals.keys():
        held = manifest.signals[name]
        assert not isinstance(held, LogitsSignal)
        if settings(asked[name]) != settings(held):
            raise ValueError(
                f"{cache}: holds {name} with {settings(held)}, but the config asks for "
                f"{settings(asked[name])}. Ask for what it holds, or take it out first: "
                f"`python -m pipelines remove {cache} {name}`, then `gc`"
            )
    return {name: signal for name, signal in asked.items() if name not in manifest.signals}


def add_signals(
    new: Mapping[str, ArraySignal],
    *,
    cache: Path,
    manifest: Manifest,
    model: str,
    on_error: Literal["fail", "skip"],
    run: Callable[[Build], None],
    console: Console,
) -> Manifest:
    """Capture `new` for the rows of the cache's first part and seal it again."""
    layout, part = part_layout(cache, 0), manifest.parts[0]
    console.print(f"{cache}: sealed with {', '.join(manifest.signals)}; adding {', '.join(new)}")
    path = layout.addition(digest({name: settings(signal) for name, signal in new.items()}))
    if not path.exists():
        require_space(new, cache=cache, units=part.units, length=manifest.sequence_length)
        base = read_plan(layout.plan)
        sealed = dataclasses.replace(
            base,
            rows=dataclasses.replace(base.rows, units=part.units),
            teacher=dataclasses.replace(base.teacher, model=model),
            on_error=on_error,
        )
        job = AddJob(part=layout.root.resolve(), path=path.resolve(), sealed=sealed, arrays=new)
        run(
            lambda pipeline: (
                pipeline
                | beam.Create([job])
                | "Calibrate" >> beam.Map(with_teacher, calibrate_addition)
            )
        )
    plan = with_teacher_at(model, path)
    _refuse_leftovers(layout, plan, cache=cache)
    capture_plan(plan, path, part=layout.root, run=run, console=console)
    gained = seal_addition(cache, manifest, plan)
    clean(layout, sealed=gained)
    return gained


def require_space(
    arrays: Mapping[str, ArraySignal], *, cache: Path, units: Sequence[Unit], length: int
) -> None:
    """ValueError if the disk can't hold the units' arrays, however well they compress: what is not
    scored takes nothing."""
    rows, scored = (sum(getattr(unit, name) for unit in units) for name in ("rows", "scored"))
    least = {
        name: scored * least_bytes(signal, length=length) // length
        for name, signal in arrays.items()
    }
    free = shutil.disk_usage(cache).free
    if sum(least.values()) > free:
        sizes = ", ".join(f"{name} {size / 1e9:,.1f} GB" for name, size in least.items())
        raise ValueError(
            f"{cache}: {free / 1e9:,.1f} GB free, but {rows:,} rows of {length} tokens take at "
            f"least {sum(least.values()) / 1e9:,.1f} GB ({sizes}); ask for fewer layers or heads, "
            "for narrower numbers (signals.hidden.dtype, signals.hidden.width), or for less text"
        )


def _refuse_leftovers(layout: PartLayout, plan: Plan, *, cache: Path) -> None:
    """ValueError if a removed signal's files lie where one of the same name would go."""
    for name, signal in plan.signals.items():
        for number in range(len(plan.rows.units)):
            commit = read_commit(layout.root, name, number)
            if commit and commit.signal_id != signal.signal_id:
                raise ValueError(
                    f"{layout.commit(name, number)}: of another {name}, which was removed from "
                    f"this cache but not deleted; run `python -m pipelines gc {cache}` first"
                )
