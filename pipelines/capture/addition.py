"""Adds signals to a sealed cache: same rows, same teacher; files that are there stay unchanged.

An addition in progress has a plan file of its own, so that a rerun goes on where it stopped.
Readers see the old manifest until the new one replaces it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import apache_beam as beam
from rich.console import Console

from decant.pipelines.calibration.calibrate import AdditionJob, calibrate_addition
from decant.pipelines.calibration.known import Known, known_statistics, own_basis
from decant.pipelines.calibration.signal_specs import AddedSignal, settings
from decant.pipelines.capture.disk_space import require_space
from decant.pipelines.capture.remaining_units import capture_remaining
from decant.pipelines.capture.seal import seal_addition
from decant.pipelines.capture.teacher_lease import with_teacher
from decant.pipelines.runners.run_pipeline import Build
from decant.schemas.disk.identity import digest
from decant.schemas.disk.layout import PartLayout
from decant.schemas.disk.stand_in import exists
from decant.schemas.manifest.commits import valid_commit
from decant.schemas.manifest.manifest import Manifest, Part
from decant.schemas.manifest.plan import (
    Plan,
    additions,
    plan_as_sealed,
    read_plan,
    set_teacher_model,
)
from decant.schemas.signals import LogitsSignal


def lacking_signals(
    asked: Mapping[str, AddedSignal], parts: Sequence[Part], *, cache: Path
) -> dict[str, AddedSignal]:
    """The signals of `asked` that at least one part lacks.

    ValueError if a part has one of them with other settings.
    """
    for part in parts:
        for name in asked.keys() & part.signals.keys():
            held = part.signals[name]
            assert not isinstance(held, LogitsSignal)
            if settings(asked[name]) != settings(held):
                raise ValueError(
                    f"{cache}: holds {name} with {settings(held)}, but the config asks for "
                    f"{settings(asked[name])}. Ask for what it holds, or take it out first: "
                    f"`decant remove {cache} {name}`, then `decant gc {cache}`"
                )
    return {
        name: signal
        for name, signal in asked.items()
        if any(name not in part.signals for part in parts)
    }


@dataclass(frozen=True)
class Adding:
    """The settings that all directories of one addition share."""

    cache: Path
    model: str
    """Where workers open the teacher."""
    on_error: Literal["fail", "skip"]
    run: Callable[[Build], None]
    """Runs a Beam pipeline."""
    console: Console


def add_signals(
    new: Mapping[str, Mapping[str, AddedSignal]],
    *,
    manifest: Manifest,
    known: Known,
    adding: Adding,
) -> Manifest:
    """Capture the signals that part directories lack, then seal all of them at once.

    `new` maps a directory's path to the signals that it lacks, by name. `known` are statistics of
    parts that have a signal already; a signal that no part has takes those found in the first
    directory.
    """
    cache, plans = adding.cache, {}
    names = {name: None for signals in new.values() for name in signals}
    adding.console.print(
        f"{cache}: sealed with {', '.join(manifest.signals)}; adding {', '.join(names)}"
    )
    units = [unit for part in manifest.parts if part.path in new for unit in part.units]
    added = {name: signal for signals in new.values() for name, signal in signals.items()}
    begun = any(additions(PartLayout(cache / path)) for path in new)
    if not begun:
        require_space(added, cache=cache, units=units, length=manifest.sequence_length)
    for path, signals in new.items():
        parts = [part for part in manifest.parts if part.path == path]
        plan = plans[path] = _capture_directory(signals, path, parts, known=known, adding=adding)
        known = known_statistics(cache, plan.signals, plan.statistics, path=path) | dict(known)
    return seal_addition(cache, plans)


def _capture_directory(
    new: Mapping[str, AddedSignal],
    directory: str,
    parts: Sequence[Part],
    *,
    known: Known,
    adding: Adding,
) -> Plan:
    """Capture the signals `new` for all units of a directory; returns their plan."""
    layout, run = PartLayout(adding.cache / directory), adding.run
    _refuse_other_additions(layout, new, cache=adding.cache)
    path = layout.addition(digest({name: settings(signal) for name, signal in new.items()}))
    if not exists(path):
        base = plan_as_sealed(read_plan(layout.plan), parts)
        sealed = dataclasses.replace(
            base,
            teacher=dataclasses.replace(base.teacher, model=adding.model),
            on_error=adding.on_error,
        )
        job = AdditionJob(
            part=layout.root.resolve(),
            path=path.resolve(),
            sealed=sealed,
            signals=new,
            known={name: reused for name, reused in known.items() if name in new},
        )
        run(
            lambda pipeline: (
                pipeline
                | beam.Create([job])
                | "Calibrate" >> beam.Map(with_teacher, calibrate_addition)
            )
        )
    plan = set_teacher_model(adding.model, path)
    if notice := own_basis(known, plan.statistics):
        adding.console.print(notice)
    _refuse_leftovers(layout, plan, cache=adding.cache)
    capture_remaining(plan, path, part=layout.root, run=run, console=adding.console)
    return plan


def _refuse_other_additions(
    layout: PartLayout, new: Mapping[str, AddedSignal], *, cache: Path
) -> None:
    """ValueError if an unfinished addition makes a signal of the same name with other settings."""
    for path in additions(layout):
        for name, signal in read_plan(path).signals.items():
            assert not isinstance(signal, LogitsSignal)
            if name in new and settings(signal) != settings(new[name]):
                raise ValueError(
                    f"{path}: an addition of {name} with other settings is unfinished. Finish it, "
                    f"or run `decant gc {cache}` first"
                )


def _refuse_leftovers(layout: PartLayout, plan: Plan, *, cache: Path) -> None:
    """ValueError if files of a removed signal lie where a new one of that name would be written."""
    for name, signal in plan.signals.items():
        for number in range(len(plan.rows.units)):
            commit = valid_commit(layout.root, name, number)
            if commit and commit.signal_id != signal.signal_id:
                raise ValueError(
                    f"{layout.commit(name, number)}: belongs to another {name}, which was removed "
                    f"from this cache but not deleted; run `decant gc {cache}` first"
                )
