"""Sealing: every commit is read again against the plan, then the manifest appears at once."""

import shutil
from pathlib import Path

from pipelines.capture import SIGNAL, committed, read_commit
from schemas.files import require_file
from schemas.layout import PartLayout, part_layout
from schemas.manifest import Manifest, Part, Unit, write_manifest
from schemas.plan import Plan


def seal(cache: Path, plan: Plan) -> Manifest:
    """Write the manifest of a cache whose first part is complete.

    ValueError that names the first unit that is missing or differs from the plan. Commits of
    another plan never get in: their signal_id differs.
    """
    layout = part_layout(cache, 0)
    units = tuple(_checked(layout, number, plan) for number in range(len(plan.rows.units)))
    part = Part(
        path=layout.root.relative_to(cache).as_posix(),
        rows_id=plan.rows.rows_id,
        unit_rows=plan.rows.unit_rows,
        units=units,
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
    clean(layout)
    return sealed


def clean(layout: PartLayout) -> None:
    """Remove what an unfinished capture needed and what killed writers left behind."""
    shutil.rmtree(layout.work, ignore_errors=True)
    for leftover in layout.root.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def _checked(layout: PartLayout, number: int, plan: Plan) -> Unit:
    unit = plan.rows.units[number]
    require_file(layout.records("rows", number), unit.files["rows"])
    commit = read_commit(layout.root, number)
    if commit is None:
        raise ValueError(
            f"{layout.commit(SIGNAL, number)}: no valid commit of unit {number}; run again, only "
            "what is missing is captured"
        )
    if commit.unit != number or commit.signal_id != plan.signals[SIGNAL].signal_id:
        raise ValueError(
            f"{layout.commit(SIGNAL, number)}: commit of unit {commit.unit} and signal "
            f"{commit.signal_id[:12]}, expected unit {number} and signal "
            f"{plan.signals[SIGNAL].signal_id[:12]}; remove this file and run again"
        )
    if commit.file.records != unit.rows:
        raise ValueError(
            f"{layout.records(SIGNAL, number)}: {commit.file.records} records for "
            f"{unit.rows} rows; remove the unit's commit and run again"
        )
    return committed(unit, commit)
