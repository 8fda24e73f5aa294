"""Sealing: check every commit against the plan again, then write the manifest atomically."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from decant.pipelines.capture.part_directories import is_complete
from decant.schemas.disk import inside, steps
from decant.schemas.disk.array_record import require_file
from decant.schemas.disk.layout import MANIFEST, ROWS, PartLayout
from decant.schemas.disk.locks import changing, uncaptured
from decant.schemas.disk.stand_in import bucket_of, each_of, exists
from decant.schemas.disk.steps import Step
from decant.schemas.manifest.commits import Commit, valid_commit
from decant.schemas.manifest.manifest import (
    Manifest,
    Part,
    Unit,
    changing_manifest,
    read_manifest,
    until_agreed,
    write_manifest,
)
from decant.schemas.manifest.plan import Plan, PlannedRows, additions, read_plan, rows_id_of
from decant.schemas.manifest.tokenizer_files import (
    has_tokenizer,
    tokenizer_files,
    tokenizer_hashes,
)
from decant.schemas.reading.forgetting import wholly_forgotten_rows


def seal(cache: Path, layout: PartLayout, plan: Plan, *, partial: bool = False) -> Manifest:
    """Append the units that the manifest lacks to it, as one new part.

    `partial` takes only the units that are committed; otherwise all must be. ValueError that names
    the first unit whose commit is missing or differs from the plan, or says that no unit is left to
    seal in part. A commit of another plan is refused by its signal_id.
    """

    def change() -> Manifest:
        with changing(cache):
            return _seal(cache, layout, plan, partial=partial)

    return until_agreed(cache, change)


def _seal(cache: Path, layout: PartLayout, plan: Plan, *, partial: bool) -> Manifest:
    # Read now, not when the capture began: a partial seal may have replaced it meanwhile.
    manifest = read_manifest(cache) if exists(cache / MANIFEST) else _empty(cache, plan)
    path = layout.root.relative_to(cache).as_posix()
    done = {n for part in manifest.parts if part.path == path for n in part.unit_numbers}
    left = [n for n in range(len(plan.rows.units)) if n not in done]
    if partial:
        committed = each_of(lambda n: _is_committed(layout, n, plan), left, cache=cache)
        left = [n for n, is_done in zip(left, committed, strict=True) if is_done]
        if not left:
            raise ValueError(
                f"{layout.root}: no unit is committed that is not sealed already, so there is "
                "nothing to seal; run without --seal-partial first"
            )
    if left:
        before = [part for part in manifest.parts if part.path == path]
        part = _sealed_part(layout, plan, path=path, numbers=left, before=before)
        steps.reached(Step.COMMITS_CHECKED)
        present = manifest.cache_id or None
        grown = dataclasses.replace(manifest, parts=(*manifest.parts, part))
        manifest = write_manifest(cache, grown, replaces=present)
        steps.reached(Step.SEALED)
    return manifest


def _empty(cache: Path, plan: Plan) -> Manifest:
    return Manifest(
        sequence_length=plan.teacher.sequence_length,
        vocabulary_size=plan.teacher.vocabulary_size,
        tokenizer=plan.tokenizer,
        parts=(),
        tokenizer_files=_tokenizer_hashes(cache),
    )


def _tokenizer_hashes(cache: Path) -> dict[str, str]:
    return tokenizer_hashes(tokenizer_files(cache)) if has_tokenizer(cache) else {}


def _sealed_part(
    layout: PartLayout, plan: Plan, *, path: str, numbers: list[int], before: Sequence[Part]
) -> Part:
    """The part made of the units `numbers`; `before` are the sealed parts of the directory.

    What those forget, the new part forgets too.
    """
    rows, planned, whole = plan.rows, plan.rows.units, len(numbers) == len(plan.rows.units)
    checked = each_of(
        lambda n: _checked_unit(layout, n, planned[n], plan), numbers, cache=layout.root
    )
    forgotten = before[0].forgotten if before else ()
    part = Part(
        path=path,
        rows_id=rows_id_of(rows, numbers),
        unit_rows=rows.unit_rows,
        units=tuple(checked),
        signals=plan.signals,
        statistics=plan.statistics,
        sources=rows.sources,
        # They belong to the whole directory, so only its first part lists them.
        skipped=() if before else rows.skipped,
        duplicates=0 if before else rows.duplicates,
        unwritten={} if before else rows.unwritten,
        writers=rows.writers,
        weights=rows.weights,
        numbers=() if whole else tuple(numbers),
        planned_units=0 if whole else len(rows.units),
        forgotten=forgotten,
        aligned=plan.aligned,
    )
    if not forgotten:
        return part
    empty = wholly_forgotten_rows(layout.root, part, length=plan.teacher.sequence_length)
    return dataclasses.replace(part, forgotten_rows=empty)


def seal_addition(cache: Path, plans: dict[str, Plan]) -> Manifest:
    """Replace the manifest by one whose parts also have the signals of `plans`.

    `plans` are the plans of the additions, by the path of the part directory. ValueError for a
    commit that is missing or differs, and for a part that has changed since the plan was made.
    """

    def change() -> Manifest:
        with changing_manifest(cache) as manifest:
            return _seal_addition(cache, manifest, plans)

    return until_agreed(cache, change)


def _seal_addition(cache: Path, manifest: Manifest, plans: dict[str, Plan]) -> Manifest:
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
    layout, planned = PartLayout(cache / part.path), plan.rows.units
    for name, signal in plan.signals.items():
        if part.signals.get(name, signal) != signal:
            raise ValueError(
                f"{layout.root}: another capture has added {name} with other settings meanwhile; "
                f"run `decant verify {cache}`"
            )
    for number, unit in part.numbered_units:
        if unit.files[ROWS] != planned[number].files[ROWS]:
            raise ValueError(
                f"{layout.root}: `gc` has overwritten rows of unit {number} since this addition "
                f"began; run `decant gc {cache}`, then the same command again"
            )
    # From the manifest, not the plan: other signals may have been added since it was made.
    units = each_of(
        lambda pair: _checked_unit(layout, *pair, plan), part.numbered_units, cache=layout.root
    )
    return dataclasses.replace(
        part,
        units=tuple(units),
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
        unwritten=rows.unwritten,
        writers=rows.writers,
        weights=rows.weights,
    )
    manifest = Manifest(
        sequence_length=like.sequence_length,
        vocabulary_size=like.vocabulary_size,
        tokenizer=like.tokenizer,
        parts=(part,),
        tokenizer_files=_tokenizer_hashes(cache),
    )
    return write_manifest(cache, manifest, replaces=None)


def clean(cache: Path, layout: PartLayout) -> None:
    """Delete scratch files of a finished capture, and temporary files of killed writers.

    Does nothing if the directory is not wholly sealed, or while another capture of it is under way;
    nor in a bucket, where no lock tells of one: `gc` deletes there what is old.
    """
    if bucket_of(cache):
        return
    with changing_manifest(cache) as manifest, uncaptured(layout.root) as free:
        if free and is_complete(layout, cache, manifest):
            for file in _scratch_files(cache, layout, manifest):
                inside.remove(cache, file.relative_to(cache))


def _scratch_files(cache: Path, layout: PartLayout, manifest: Manifest) -> Iterator[Path]:
    held = [set(part.signals) for part in manifest.parts if cache / part.path == layout.root]
    for addition in additions(layout):
        if all(read_plan(addition).signals.keys() <= signals for signals in held):
            yield addition
    yield layout.work
    yield from sorted(layout.root.rglob(".*.tmp"))
    yield from cache.glob(f".{MANIFEST}.*.tmp")


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
