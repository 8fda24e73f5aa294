"""Verification of a sealed cache: all files against the manifest, some rows against the teacher."""

import itertools
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from decant.models import Checkpoint
from decant.models.checkpoints.hf_layout import CONFIG
from decant.models.families import config_from_file
from decant.pipelines.teacher.identity import open_teacher_of
from decant.pipelines.verification.aligned import compare_aligned
from decant.pipelines.verification.content import Content, compare_rows
from decant.pipelines.verification.reference import LAST, Reference
from decant.pipelines.verification.repair import Repair
from decant.pipelines.verification.structure import Problem, Structure, check_structure
from decant.schemas import Cache, open_cache
from decant.schemas.disk.layout import PartLayout
from decant.schemas.disk.stand_in import address_of
from decant.schemas.manifest.manifest import Manifest, Part, read_manifest
from decant.schemas.manifest.plan import PlannedTeacher, read_plan
from decant.schemas.signals import AttentionSignal, HiddenSignal, SketchSignal


@dataclass
class Verification:
    """The result of `verify`."""

    cache: str
    """Path or address."""
    cache_id: str
    structure: Structure
    content: dict[str, Content] = field(default_factory=dict)
    """Comparison with the teacher, by part."""
    unable: str | None = None
    """Why rows could not be compared with the teacher; None if they were."""
    repairs: list[Repair] = field(default_factory=list)
    """Repairs made before the verification."""

    @property
    def status(self) -> int:
        """0: the cache is fine; 1: something is wrong; 2: no problem, but no rows were compared."""
        if self.structure.problems or not all(c.fine for c in self.content.values()):
            return 1
        return 2 if self.unable else 0


def verify(
    path: Path,
    *,
    rows: int,
    teacher: str | None,
    fetch: bool = False,
    memory: Path,
    console: Console | None = None,
) -> Verification:
    """Check every file, then compare `rows` rows with the teacher (0: check files only).

    `path` may stand for an address. `teacher` says where the teacher is, if not where the plan has
    it; `fetch`, whether a hub id that only the plan names may be fetched. `memory` is the file that
    remembers hashes of the teacher's files. Progress goes to `console`. Damaged units are not
    compared. ValueError if there is no sealed cache, or if another command changed it meanwhile.
    """
    cache = open_cache(address_of(path))
    structure = check_structure(path, cache.manifest, console=console)
    if structure.problems and read_manifest(path).cache_id != cache.manifest.cache_id:
        raise ValueError(f"{path}: was changed while it was checked; run `verify` again")
    result = Verification(address_of(path), cache.manifest.cache_id, structure)
    if not rows or not cache.manifest.signals:
        return result  # no teacher has read a cache without signals
    sample = sample_rows(cache.manifest, structure, rows=rows)
    try:
        for part, numbers in zip(cache.manifest.parts, sample, strict=True):
            if not structure.readable(part):
                raise ValueError(
                    f"{path / part.path}: its plan, statistics or metadata are damaged, so its "
                    "rows were not compared with the teacher"
                )
            if numbers and part.aligned:
                content = compare_aligned(cache, part, numbers, place=teacher, console=console)
                result.content[_part_label(part.path, result.content)] = content
            elif numbers:
                planned = read_plan(PartLayout(path / part.path).plan).teacher
                checkpoint = open_teacher_of(
                    cache, part, planned, teacher, fetch=fetch, memory=memory
                )
                structure.problems += _config_problems(cache, checkpoint)
                content = _compare_part(cache, part, numbers, checkpoint, planned, console)
                result.content[_part_label(part.path, result.content)] = content
        if not result.content:
            raise ValueError(f"{path}: no undamaged row to compare with the teacher")
    except (ValueError, OSError, RuntimeError) as error:
        result.unable = str(error)
    return result


def sample_rows(manifest: Manifest, structure: Structure, *, rows: int) -> list[list[int]]:
    """Numbers of the rows to compare, one list a part; always the same for the same cache.

    They are spread evenly over the rows of undamaged units, the first and the last row included.
    """
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


def _part_label(path: str, used: Container[str]) -> str:
    """A name for a part that is not in `used`: its directory, or that with a number."""
    others = (f"{path}, part {n} of it" for n in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if name not in used)


def _config_problems(cache: Cache, checkpoint: Checkpoint) -> list[Problem]:
    """Problems of the teacher's config in `tokenizer/`, for which the manifest has no hash."""
    file = cache.tokenizer_path / CONFIG
    try:
        # Compared as parsed: another release may write the same config with more fields.
        stored = config_from_file(file).identity()
    except (ValueError, OSError) as error:
        stored = str(error)
    if stored == checkpoint.config.identity():
        return []
    got = stored[:160] if isinstance(stored, str) else "another one"
    return [Problem(file.relative_to(cache.path).as_posix(), "the teacher's config", got)]


def _compare_part(
    cache: Cache,
    part: Part,
    rows: Sequence[int],
    checkpoint: Checkpoint,
    planned: PlannedTeacher,
    console: Console | None,
) -> Content:
    signals = part.signals.values()
    reference = Reference(
        checkpoint,
        planned,
        layers=[
            *(s.layer for s in signals if isinstance(s, HiddenSignal)),
            *(LAST for s in signals if isinstance(s, SketchSignal)),
        ],
        blocks=[s.layer for s in signals if isinstance(s, AttentionSignal)],
    )
    return compare_rows(cache, part, rows, reference, dtype=planned.dtype, console=console)
