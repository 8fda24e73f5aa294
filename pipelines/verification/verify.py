"""`verify CACHE`: is it what was sealed, and is what was sealed what the teacher says?"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from decant.models import Checkpoint
from decant.models.checkpoints.hf_layout import CONFIG
from decant.models.families import config_from_json
from decant.pipelines.teacher.identity import digest_memory, open_teacher_of
from decant.pipelines.verification.content import Content, compare
from decant.pipelines.verification.reference import Reference
from decant.pipelines.verification.repair import Repair, repair
from decant.pipelines.verification.structure import Problem, Structure, check_structure
from decant.schemas import Cache, open_cache
from decant.schemas.disk.layout import PartLayout
from decant.schemas.manifest.manifest import Manifest, Part
from decant.schemas.manifest.plan import PlannedTeacher, read_plan
from decant.schemas.signals import AttentionSignal, HiddenSignal

_WIDTH = 140
"""Columns of a file that the report is written to."""
_SHOWN = 40
"""Problems that the terminal gets; `--json` has all."""


@dataclass
class Report:
    """What came of it."""

    cache: Path
    cache_id: str
    structure: Structure
    content: dict[str, Content] = field(default_factory=dict)
    """By part."""
    unable: str | None = None
    """Why the content could not be compared."""
    repairs: list[Repair] = field(default_factory=list)

    @property
    def status(self) -> int:
        """0: fine; 1: something is wrong; 2: nothing is, as far as it could be looked at."""
        if self.structure.problems or not all(c.fine for c in self.content.values()):
            return 1
        return 2 if self.unable else 0


def verify(path: Path, *, rows: int, teacher: str | None, memory: Path) -> Report:
    """Every file, then `rows` rows by the teacher, which is the plan's or lies at `teacher`.

    ValueError for what is no sealed cache. Damaged units are left out of the comparison. `memory`
    remembers the hashes of the teacher's files.
    """
    cache = open_cache(path)
    report = Report(path, cache.manifest.cache_id, check_structure(path, cache.manifest))
    if not rows or not cache.manifest.signals:
        return report  # of rows alone nobody said anything
    sample = sample_rows(cache.manifest, report.structure, rows=rows)
    try:
        for part, numbers in zip(cache.manifest.parts, sample, strict=True):
            if not report.structure.readable(part):
                raise ValueError(
                    f"{path / part.path}: its plan, statistics or metadata are damaged, so its "
                    "rows were not compared with the teacher"
                )
            if numbers:
                planned = read_plan(PartLayout(path / part.path).plan).teacher
                checkpoint = open_teacher_of(cache, part, planned, teacher, memory=memory)
                report.structure.problems += _other_config(cache, checkpoint)
                found = _compare(cache, part, numbers, checkpoint, planned)
                report.content[_unused(part.path, report.content)] = found
        if not report.content:
            raise ValueError(f"{path}: no undamaged row to compare with the teacher")
    except (ValueError, OSError, RuntimeError) as error:
        report.unable = str(error)
    return report


def sample_rows(manifest: Manifest, structure: Structure, *, rows: int) -> list[list[int]]:
    """Row numbers to compare, by part: spread evenly over those of undamaged units, first and last
    among them, so the same for the same cache."""
    candidates: list[int] = []
    first, bounds = 0, [0]
    for part in manifest.parts:
        damaged = structure.damaged(part)
        gone = set(part.forgotten_rows)
        for number, unit in part.numbered_units:
            if number not in damaged:
                candidates += [
                    first + i
                    for i in range(unit.rows)
                    if i not in unit.skipped_rows and (number, i) not in gone
                ]
            first += unit.rows
        bounds.append(first)
    if not candidates:
        return [[] for _ in manifest.parts]
    picked = np.linspace(0, len(candidates) - 1, min(rows, len(candidates))).round().astype(int)
    chosen = np.unique(np.array(candidates)[picked])
    return [
        [int(row) for row in chosen[(chosen >= low) & (chosen < high)]]
        for low, high in itertools.pairwise(bounds)
    ]


def _unused(path: str, names: Container[str]) -> str:
    """The directory's name for one more part of it."""
    others = (f"{path}, part {n} of it" for n in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if name not in names)


def _other_config(cache: Cache, checkpoint: Checkpoint) -> list[Problem]:
    """What is wrong with the config beside the tokenizer, whose hash nobody keeps."""
    file = cache.tokenizer_path / CONFIG
    try:
        # As it is read: another release may write the same with more fields.
        found = config_from_json(json.loads(file.read_bytes())).identity()
    except (ValueError, KeyError, TypeError, OSError) as error:
        found = str(error)
    if found == checkpoint.config.identity():
        return []
    got = found[:160] if isinstance(found, str) else "another one"
    return [Problem(file.relative_to(cache.path).as_posix(), "the teacher's config", got)]


def _compare(
    cache: Cache,
    part: Part,
    rows: Sequence[int],
    checkpoint: Checkpoint,
    planned: PlannedTeacher,
) -> Content:
    signals = part.signals.values()
    reference = Reference(
        checkpoint,
        planned,
        layers=[s.layer for s in signals if isinstance(s, HiddenSignal)],
        blocks=[s.layer for s in signals if isinstance(s, AttentionSignal)],
    )
    return compare(cache, part, rows, reference, dtype=planned.dtype)


def verify_and_tell(
    path: Path, *, rows: int, teacher: str | None, mend: bool, as_json: bool
) -> int:
    """The command: prints a table or one JSON document. Returns the exit status."""
    try:
        report = _mended(path, teacher) if mend else []
        found = verify(path, rows=rows, teacher=teacher, memory=digest_memory())
        found.repairs = report
    except (ValueError, OSError, RuntimeError) as error:
        if as_json:
            print(json.dumps({"cache": str(path), "status": 2, "error": str(error)}))
        else:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(to_json(found), indent=1, ensure_ascii=False))
    else:
        console = Console(highlight=False, soft_wrap=True)
        if not console.is_terminal:
            console.width = _WIDTH
        show(found, console)
    return found.status


def _mended(path: Path, teacher: str | None) -> list[Repair]:
    cache = open_cache(path)
    structure = check_structure(path, cache.manifest)
    return repair(cache, structure, teacher=teacher, memory=digest_memory())


def to_json(report: Report) -> dict[str, Any]:
    """The whole report, for `--json`."""

    def judged(found: Any) -> dict[str, Any]:
        return dataclasses.asdict(found) | {"fine": found.fine}

    return {
        "cache": str(report.cache),
        "cache_id": report.cache_id,
        "status": report.status,
        "files": report.structure.files,
        "problems": [dataclasses.asdict(problem) for problem in report.structure.problems],
        "left_over": report.structure.left_over,
        "repairs": [dataclasses.asdict(one) for one in report.repairs],
        "unable": report.unable,
        "content": {
            part: {
                "rows": content.rows,
                "positions": content.positions,
                "cross_entropy": content.cross_entropy,
                "fine": content.fine,
                "figures": [judged(figure) for figure in content.figures],
                "counts": [judged(count) for count in content.counts],
            }
            for part, content in report.content.items()
        },
    }


def show(report: Report, console: Console) -> None:
    """The report for people."""
    for one in report.repairs:
        console.print(f"{one.where}: {'repaired' if one.done else f'not repaired, {one.why}'}")
    structure = report.structure
    wrong = len(structure.problems)
    console.print(
        f"{report.cache}: {structure.files:,} files, "
        + (f"{wrong:,} problems" if wrong else "each as it was sealed")
    )
    if wrong:
        table = Table("unit", "signal", "file", "expected", "got", box=SIMPLE_HEAD)
        for problem in structure.problems[:_SHOWN]:
            unit = "" if problem.unit is None else str(problem.unit)
            table.add_row(unit, problem.signal, problem.file, problem.expected, problem.got)
        console.print(table)
    if wrong > _SHOWN:
        console.print(f"… and {wrong - _SHOWN:,} more: --json lists all")
    if structure.left_over:
        console.print(
            f"{len(structure.left_over):,} files of removed signals or unfinished additions: "
            f"`decant gc {report.cache}` deletes them"
        )
    for part, content in report.content.items():
        console.print(
            f"{part}: {len(content.rows)} rows, {content.positions:,} positions read again by the "
            f"teacher, a document at a time (its own cross-entropy {content.cross_entropy:.3f})"
        )
        console.print(_table(content))
        if not content.fine:
            console.print(
                "What the teacher contradicts was captured wrong, not damaged later: --repair "
                "cannot mend it. Capture again into another directory."
            )
    if report.unable:
        console.print(f"not compared: {report.unable}")


def _table(content: Content) -> Table:
    table = Table("signal", "what", "mean", "p99", "max", "allowed", "", box=SIMPLE_HEAD)
    for found in content.figures:
        limits = found.allowed
        table.add_row(
            found.signal,
            found.what,
            *(f"{value:.2g}" for value in (found.mean, found.p99, found.max)),
            f"{limits.mean:.2g} / {limits.p99:.2g} / {limits.max:.2g}",
            "" if found.fine else "WRONG",
        )
    for found in content.counts:
        ties = f", {found.ties} ties" if found.ties else ""
        table.add_row(
            found.signal,
            found.what,
            f"{found.wrong:,}",
            "",
            "",
            f"{found.most:,} of {found.of:,}{ties}",
            "" if found.fine else "WRONG",
        )
    return table
