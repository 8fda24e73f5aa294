"""Sealing: check every commit against the plan again, then write the manifest atomically."""

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
from decant.schemas.manifest.plan import Plan, PlannedRows, read_plan, rows_id_of


def seal(cache: Path, layout: PartLayout, plan: Plan, *, partial: bool = False) -> Manifest:
    """Append the units that the manifest lacks to it, as one new part.

    `partial` takes only the units that are committed; otherwise all must be. ValueError that names
    the first unit whose commit is missing or differs from the plan, or says that no unit is left to
    seal in part. A commit of another plan is refused by its signal_id.
    """
    # Read now, not when the capture began: a partial seal may have replaced it meanwhile.
    manifest = read_manifest(cache) if (cache / MANIFEST).exists() else _empty(plan)
    path = layout.root.relative_to(cache).as_posix()
    done = {n for part in manifest.parts if part.path == path for n in part.unit_numbers}
    left = [n for n in range(len(plan.rows.units)) if n not in done]
    if partial:
        left = [n for n in left if _is_committed(layout, n, plan)]
        if not left:
            raise ValueError(
                f"{layout.root}: no unit is committed that is not sealed already, so there is "
                "nothing to seal; run without --seal-partial first"
            )
    if left:
        part = _sealed_part(layout, plan, path=path, numbers=left, first=not done)
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


def _sealed_part(
    layout: PartLayout, plan: Plan, *, path: str, numbers: list[int], first: bool
) -> Part:
    """The part made of the units `numbers`; `first` if it is the directory's first part."""
    rows, whole = plan.rows, len(numbers) == len(plan.rows.units)
    units = tuple(_checked_unit(layout, n, rows.units[n], plan) for n in numbers)
    return Part(
        path=path,
        rows_id=rows_id_of(rows, numbers),
        unit_rows=rows.unit_rows,
        units=units,
        signals=plan.signals,
        statistics=plan.statistics,
        sources=rows.sources,
        # They belong to the whole directory, so only its first part lists them.
        skipped=rows.skipped if first else (),
        duplicates=rows.duplicates if first else 0,
        numbers=() if whole else tuple(numbers),
        planned_units=0 if whole else len(rows.units),
    )


def seal_addition(cache: Path, manifest: Manifest, plans: dict[str, Plan]) -> Manifest:
    """Replace `manifest` by one whose parts also have the signals of `plans`.

    `plans` are the plans of the additions, by the path of the part directory. ValueError for a
    commit that is missing or differs. RuntimeError if another process replaced the manifest
    meanwhile.
    """
    parts = tuple(
        _part_with_signals(cache, part, plans[part.path]) if part.path in plans else part
        for part in manifest.parts
    )
    steps.reached(Step.COMMITS_CHECKED)
    new = dataclasses.replace(manifest, parts=parts)
    sealed = write_manifest(cache, new, replaces=manifest.cache_id)
    steps.reached(Step.SEALED)
    return sealed


def _part_with_signals(cache: Path, part: Part, plan: Plan) -> Part:
    layout = PartLayout(cache / part.path)
    return dataclasses.replace(
        part,
        # From the manifest, not the plan: other signals may have been added since it was made.
        units=tuple(_checked_unit(layout, n, unit, plan) for n, unit in part.numbered_units),
        signals={**part.signals, **plan.signals},
        statistics={**part.statistics, **plan.statistics},
    )


def seal_rows(cache: Path, layout: PartLayout, rows: PlannedRows, *, like: Manifest) -> Manifest:
    """Seal a cache of rows without signals; `like` is the manifest of the cache to mix it with."""
    part = Part(
        path=layout.root.relative_to(cache).as_posix(),
        rows_id=rows.rows_id,
        unit_rows=rows.unit_rows,
        units=rows.units,
        signals={},
        statistics={},
        sources=rows.sources,
        skipped=rows.skipped,
        duplicates=rows.duplicates,
    )
    manifest = Manifest(
        sequence_length=like.sequence_length,
        vocabulary_size=like.vocabulary_size,
        tokenizer=like.tokenizer,
        parts=(part,),
    )
    sealed = write_manifest(cache, manifest, replaces=None)
    clean(layout, sealed=sealed, path=part.path)
    return sealed


def clean(layout: PartLayout, *, sealed: Manifest, path: str) -> None:
    """Delete scratch files of a finished capture, and temporary files of killed writers.

    `path` is the part directory's name in the manifest `sealed`.
    """
    held: Iterable[set[str]] = [set(p.signals) for p in sealed.parts if p.path == path]
    for addition in layout.additions:
        if all(read_plan(addition).signals.keys() <= signals for signals in held):
            addition.unlink()
    shutil.rmtree(layout.work, ignore_errors=True)
    cache = layout.root.parents[1]
    for leftover in (*layout.root.rglob(".*.tmp"), *cache.glob(f".{MANIFEST}.*.tmp")):
        leftover.unlink(missing_ok=True)


def _checked_unit(layout: PartLayout, number: int, unit: Unit, plan: Plan) -> Unit:
    """The unit with the files and skipped rows of its commits added."""
    require_file(layout.records(ROWS, number), unit.files[ROWS])
    commits = {name: _checked_commit(layout, name, number, plan) for name in plan.signals}
    files = {name: commit.file for name, commit in commits.items()}
    skipped = set(unit.skipped_rows).union(*(c.skipped_rows for c in commits.values()))
    return dataclasses.replace(
        unit, files={**unit.files, **files}, skipped_rows=tuple(sorted(skipped))
    )


def _is_committed(layout: PartLayout, number: int, plan: Plan) -> bool:
    """Whether every signal of the plan has a commit of the unit, and none is of another plan."""
    commits = {name: valid_commit(layout.root, name, number) for name in plan.signals}
    return all(c and c.signal_id == plan.signals[name].signal_id for name, c in commits.items())


def _checked_commit(layout: PartLayout, name: str, number: int, plan: Plan) -> Commit:
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
