"""Signals that a sealed cache gains: same rows and teacher, its files left as they are.

Readers have the old manifest until the new one takes its place. What is under way stands in a
plan of its own, so that a rerun goes on where it stopped.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import apache_beam as beam
from rich.console import Console

from decant.pipelines.calibration.calibrate import (
    AddJob,
    Known,
    calibrate_addition,
    known_directions,
)
from decant.pipelines.calibration.signal_specs import least_bytes, settings
from decant.pipelines.capture.lease import with_teacher
from decant.pipelines.capture.schedule import capture_plan
from decant.pipelines.capture.seal import clean, seal_addition
from decant.pipelines.runners.run_pipeline import Build
from decant.schemas.disk.identity import digest
from decant.schemas.disk.layout import PartLayout
from decant.schemas.manifest.commits import valid_commit
from decant.schemas.manifest.manifest import Manifest, Part, Unit
from decant.schemas.manifest.plan import Plan, plan_as_sealed, read_plan, set_teacher_model
from decant.schemas.signals import ArraySignal, LogitsSignal


def not_held(
    asked: Mapping[str, ArraySignal], parts: Sequence[Part], *, cache: Path
) -> dict[str, ArraySignal]:
    """Those of `asked` that a part lacks. ValueError if one has it with other settings."""
    for part in parts:
        for name in asked.keys() & part.signals.keys():
            held = part.signals[name]
            assert not isinstance(held, LogitsSignal)
            if settings(asked[name]) != settings(held):
                raise ValueError(
                    f"{cache}: holds {name} with {settings(held)}, but the config asks for "
                    f"{settings(asked[name])}. Ask for what it holds, or take it out first: "
                    f"`decant remove {cache} {name}`, then `gc`"
                )
    return {
        name: signal
        for name, signal in asked.items()
        if any(name not in part.signals for part in parts)
    }


@dataclass(frozen=True)
class Adding:
    """How signals are added: by which teacher, and by what."""

    cache: Path
    model: str
    on_error: Literal["fail", "skip"]
    run: Callable[[Build], None]
    console: Console


def add_signals(
    new: Mapping[str, Mapping[str, ArraySignal]],
    *,
    manifest: Manifest,
    known: Mapping[str, Known],
    adding: Adding,
) -> Manifest:
    """Capture `new`, the signals that each of the cache's directories lacks, by its path, for the
    rows of all its parts, and seal them all at once.

    `known` are directions of parts that have a signal; others take those of the first directory.
    """
    cache, plans = adding.cache, {}
    names = {name: None for signals in new.values() for name in signals}
    adding.console.print(
        f"{cache}: sealed with {', '.join(manifest.signals)}; adding {', '.join(names)}"
    )
    units = [unit for part in manifest.parts if part.path in new for unit in part.units]
    shapes = {name: signal for signals in new.values() for name, signal in signals.items()}
    begun = any(PartLayout(cache / path).additions for path in new)
    if not begun:
        require_space(shapes, cache=cache, units=units, length=manifest.sequence_length)
    for path, signals in new.items():
        parts = [part for part in manifest.parts if part.path == path]
        plans[path] = _captured(signals, path, parts, known=known, adding=adding)
        found = plans[path]
        known = known_directions(cache, found.signals, found.statistics, path=path) | dict(known)
    gained = seal_addition(cache, manifest, plans)
    for path in new:
        clean(PartLayout(cache / path), sealed=gained, path=path)
    return gained


def _captured(
    new: Mapping[str, ArraySignal],
    directory: str,
    parts: Sequence[Part],
    *,
    known: Mapping[str, Known],
    adding: Adding,
) -> Plan:
    """The plan of signals that a directory gains, all its units captured."""
    layout, run = PartLayout(adding.cache / directory), adding.run
    path = layout.addition(digest({name: settings(signal) for name, signal in new.items()}))
    if not path.exists():
        base = plan_as_sealed(read_plan(layout.plan), parts)
        sealed = dataclasses.replace(
            base,
            teacher=dataclasses.replace(base.teacher, model=adding.model),
            on_error=adding.on_error,
        )
        job = AddJob(
            part=layout.root.resolve(),
            path=path.resolve(),
            sealed=sealed,
            arrays=new,
            known={name: found for name, found in known.items() if name in new},
        )
        run(
            lambda pipeline: (
                pipeline
                | beam.Create([job])
                | "Calibrate" >> beam.Map(with_teacher, calibrate_addition)
            )
        )
    plan = set_teacher_model(adding.model, path)
    _refuse_leftovers(layout, plan, cache=adding.cache)
    capture_plan(plan, path, part=layout.root, run=run, console=adding.console)
    return plan


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
            commit = valid_commit(layout.root, name, number)
            if commit and commit.signal_id != signal.signal_id:
                raise ValueError(
                    f"{layout.commit(name, number)}: of another {name}, which was removed from "
                    f"this cache but not deleted; run `decant gc {cache}` first"
                )
