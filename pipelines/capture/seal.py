"""Sealing: every commit is read again against the plan, then the manifest appears at once."""

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

from decant.schemas.disk import steps
from decant.schemas.disk.array_record import require_file
from decant.schemas.disk.layout import MANIFEST, ROWS, PartLayout
from decant.schemas.disk.steps import Step
from decant.schemas.manifest.commits import Commit, valid_commit
from decant.schemas.manifest.manifest import Manifest, Part, Unit, read_manifest, write_manifest
from decant.schemas.manifest.plan import Plan, read_plan, rows_id_of


def seal(cache: Path, layout: PartLayout, plan: Plan, *, partial: bool = False) -> Manifest:
    """Append the plan's units that no part has yet to the manifest, as a part; or if `partial`
    those of them that are committed.

    ValueError that names the first unit that is missing or differs from the plan, or if none is
    committed. Commits of another plan never get in: their signal_id differs.
    """
    # As it is now, not as it was when the capture began: it may have been sealed in part meanwhile.
    manifest = read_manifest(cache) if (cache / MANIFEST).exists() else _empty(plan)
    path = layout.root.relative_to(cache).as_posix()
    done = {n for part in manifest.parts if part.path == path for n in part.unit_numbers}
    left = [n for n in range(len(plan.rows.units)) if n not in done]
    if partial:
        left = [n for n in left if all(_stands(layout, name, n, plan) for name in plan.signals)]
        if not left:
            raise ValueError(
                f"{layout.root}: no unit is committed that is not sealed already, so there is "
                "nothing to seal; run without --seal-partial first"
            )
    if left:
        part = _part(layout, plan, path=path, numbers=left, first=not done)
        steps.reached(Step.COMMITS_CHECKED)
        present = manifest.cache_id or None
        grown = dataclasses.replace(manifest, parts=(*manifest.parts, part))
        manifest = write_manifest(cache, grown, replaces=present)
        steps.reached(Step.SEALED)
    if len(done) + len(left) == len(plan.rows.units):
        clean(layout, sealed=manifest, path=path)
    return manifest


def _empty(plan: Plan) -> Manifest:
    return Manifest(
        sequence_length=plan.teacher.sequence_length,
        vocabulary_size=plan.teacher.vocabulary_size,
        tokenizer=plan.tokenizer,
        parts=(),
    )


def _part(layout: PartLayout, plan: Plan, *, path: str, numbers: list[int], first: bool) -> Part:
    rows, whole = plan.rows, len(numbers) == len(plan.rows.units)
    units = tuple(_checked(layout, n, rows.units[n], plan) for n in numbers)
    return Part(
        path=path,
        rows_id=rows_id_of(rows, numbers),
        unit_rows=rows.unit_rows,
        units=units,
        signals=plan.signals,
        statistics=plan.statistics,
        sources=rows.sources,
        # Of the plan's documents; told once.
        skipped=rows.skipped if first else (),
        duplicates=rows.duplicates if first else 0,
        numbers=() if whole else tuple(numbers),
        planned_units=0 if whole else len(rows.units),
    )


def seal_addition(cache: Path, manifest: Manifest, plans: dict[str, Plan]) -> Manifest:
    """Replace `manifest` by one whose parts have the signals of their directories' plans besides
    their own; `plans` are by the parts' path.

    Until then readers have the old one. RuntimeError if somebody else replaced it meanwhile.
    """
    parts = tuple(
        _gained(cache, part, plans[part.path]) if part.path in plans else part
        for part in manifest.parts
    )
    steps.reached(Step.COMMITS_CHECKED)
    new = dataclasses.replace(manifest, parts=parts)
    sealed = write_manifest(cache, new, replaces=manifest.cache_id)
    steps.reached(Step.SEALED)
    return sealed


def _gained(cache: Path, part: Part, plan: Plan) -> Part:
    layout = PartLayout(cache / part.path)
    return dataclasses.replace(
        part,
        # Those of the manifest: other signals may have been added since the plan was made.
        units=tuple(_checked(layout, n, unit, plan) for n, unit in part.numbered_units),
        signals={**part.signals, **plan.signals},
        statistics={**part.statistics, **plan.statistics},
    )


def clean(layout: PartLayout, *, sealed: Manifest, path: str) -> None:
    """Remove what an unfinished capture needed and what killed writers left behind, of the
    directory that the manifest calls `path`."""
    held: Iterable[set[str]] = [set(p.signals) for p in sealed.parts if p.path == path]
    for addition in layout.additions:
        if all(read_plan(addition).signals.keys() <= signals for signals in held):
            addition.unlink()
    shutil.rmtree(layout.work, ignore_errors=True)
    cache = layout.root.parents[1]
    for leftover in (*layout.root.rglob(".*.tmp"), *cache.glob(f".{MANIFEST}.*.tmp")):
        leftover.unlink(missing_ok=True)


def _checked(layout: PartLayout, number: int, unit: Unit, plan: Plan) -> Unit:
    require_file(layout.records(ROWS, number), unit.files[ROWS])
    commits = {name: _commit(layout, name, number, plan) for name in plan.signals}
    files = {name: commit.file for name, commit in commits.items()}
    skipped = set(unit.skipped_rows).union(*(c.skipped_rows for c in commits.values()))
    return dataclasses.replace(
        unit, files={**unit.files, **files}, skipped_rows=tuple(sorted(skipped))
    )


def _stands(layout: PartLayout, name: str, number: int, plan: Plan) -> bool:
    commit = valid_commit(layout.root, name, number)
    return commit is not None and commit.signal_id == plan.signals[name].signal_id


def _commit(layout: PartLayout, name: str, number: int, plan: Plan) -> Commit:
    path = layout.commit(name, number)
    commit = valid_commit(layout.root, name, number)
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
