"""Sealing: every commit is read again against the plan, then the manifest appears at once."""

import dataclasses
import shutil
from pathlib import Path

from schemas.commits import Commit, read_commit
from schemas.files import require_file
from schemas.layout import PartLayout, part_layout
from schemas.manifest import Manifest, Part, Unit, write_manifest
from schemas.plan import Plan, read_plan


def seal(cache: Path, plan: Plan) -> Manifest:
    """Write the manifest of a cache whose first part is complete.

    ValueError that names the first unit that is missing or differs from the plan. Commits of
    another plan never get in: their signal_id differs.
    """
    layout = part_layout(cache, 0)
    part = Part(
        path=layout.root.relative_to(cache).as_posix(),
        rows_id=plan.rows.rows_id,
        unit_rows=plan.rows.unit_rows,
        units=_with_commits(layout, plan, plan.rows.units),
        signals=plan.signals,
        statistics=plan.statistics,
        sources=plan.rows.sources,
        skipped=plan.rows.skipped,
        duplicates=plan.rows.duplicates,
    )
    manifest = Manifest(
        sequence_length=plan.teacher.sequence_length,
        vocabulary_size=plan.teacher.vocabulary_size,
        tokenizer=plan.tokenizer,
        parts=(part,),
    )
    sealed = write_manifest(cache, manifest, replaces=None)
    clean(layout, sealed=sealed)
    return sealed


def seal_addition(cache: Path, manifest: Manifest, plan: Plan) -> Manifest:
    """Replace `manifest` by one whose first part has the plan's signals besides its own.

    Until then readers have the old one. RuntimeError if somebody else replaced it meanwhile.
    """
    layout, (part, *others) = part_layout(cache, 0), manifest.parts
    gained = dataclasses.replace(
        part,
        # Those of the manifest: other signals may have been added since the plan was made.
        units=_with_commits(layout, plan, part.units),
        signals={**part.signals, **plan.signals},
        statistics={**part.statistics, **plan.statistics},
    )
    new = dataclasses.replace(manifest, parts=(gained, *others))
    return write_manifest(cache, new, replaces=manifest.cache_id)


def clean(layout: PartLayout, *, sealed: Manifest) -> None:
    """Remove what an unfinished capture needed and what killed writers left behind."""
    for path in layout.additions:
        if read_plan(path).signals.keys() <= sealed.signals.keys():
            path.unlink()
    shutil.rmtree(layout.work, ignore_errors=True)
    for leftover in layout.root.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def _with_commits(layout: PartLayout, plan: Plan, units: tuple[Unit, ...]) -> tuple[Unit, ...]:
    """The units with the files of the plan's signals."""
    return tuple(_checked(layout, number, unit, plan) for number, unit in enumerate(units))


def _checked(layout: PartLayout, number: int, unit: Unit, plan: Plan) -> Unit:
    require_file(layout.records("rows", number), unit.files["rows"])
    commits = {name: _commit(layout, name, number, plan) for name in plan.signals}
    files = {name: commit.file for name, commit in commits.items()}
    skipped = set(unit.skipped_rows).union(*(c.skipped_rows for c in commits.values()))
    return dataclasses.replace(
        unit, files={**unit.files, **files}, skipped_rows=tuple(sorted(skipped))
    )


def _commit(layout: PartLayout, name: str, number: int, plan: Plan) -> Commit:
    path = layout.commit(name, number)
    commit = read_commit(layout.root, name, number)
    if commit is None:
        raise ValueError(
            f"{path}: no valid commit of unit {number}; run again, only what is missing is captured"
        )
    expected = plan.signals[name].signal_id
    if commit.unit != number or commit.signal_id != expected:
        raise ValueError(
            f"{path}: commit of unit {commit.unit} and signal {commit.signal_id[:12]}, expected "
            f"unit {number} and signal {expected[:12]}; remove this file and run again"
        )
    rows = plan.rows.units[number].rows
    if commit.file.records != rows:
        raise ValueError(
            f"{path}: {commit.file.records} rows of {name} for {rows} rows of unit {number}; "
            "remove this file and run again"
        )
    return commit
