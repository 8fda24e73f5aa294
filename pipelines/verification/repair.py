"""`verify --repair`: units whose files are damaged or missing, captured again to the same bytes.

Capture is a function of the plan and the rows, so what comes out must be what the manifest names;
what is not is thrown away. It is made in a directory of its own: nothing else of the cache is
touched, and the manifest stays.
"""

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from decant.pipelines.capture.unit import capture_unit, provenance
from decant.pipelines.teacher.identity import open_teacher_of
from decant.pipelines.verification.structure import Problem, Structure
from decant.schemas import Cache
from decant.schemas.arrays.spec import METADATA, create_array, specs_of
from decant.schemas.disk.atomic import write_bytes
from decant.schemas.disk.identity import file_sha256
from decant.schemas.disk.layout import LOGITS, ROWS, PartLayout
from decant.schemas.manifest.commits import Commit, load_commit
from decant.schemas.manifest.manifest import Part
from decant.schemas.manifest.plan import Plan, plan_as_sealed, read_plan, write_plan
from decant.schemas.signals import LogitsSignal


@dataclass(frozen=True)
class Repair:
    """What became of one unit and signal, or of a problem that no capture can mend."""

    where: str
    done: bool
    why: str = ""


def repair(
    cache: Cache, structure: Structure, *, teacher: str | None, memory: Path
) -> list[Repair]:
    """Put right what can be: damaged units, by the plan's teacher or the one at `teacher`.

    ValueError if that is not the teacher of the cache.
    """
    done: list[Repair] = []
    seen: set[str] = set()
    for part in cache.manifest.parts:
        if part.path not in seen:  # what a directory has once
            done += _metadata(cache, part, structure)
            done += [_beyond(p) for p in structure.problems if p.part == part.path and _lost(p)]
        seen.add(part.path)
        damaged = {
            number: signals - {ROWS}
            for number, signals in structure.damaged(part).items()
            if ROWS not in signals and number in part.unit_numbers
        }
        if not damaged:
            continue
        if part.in_other_cache:
            place = (cache.path / part.path).resolve()
            why = f"it belongs to another cache: `verify --repair` that one, {place.parents[1]}"
            done += [Repair(f"{place}, unit {number}", False, why) for number in sorted(damaged)]
            continue
        if not structure.recapturable(part):
            why = "the part's plan or statistics are damaged too: without them nothing is captured"
            done += [
                Repair(f"{part.path}, unit {number}", False, why) for number in sorted(damaged)
            ]
            continue
        plan = read_plan(PartLayout(cache.path / part.path).plan)
        checkpoint = open_teacher_of(cache, part, plan.teacher, teacher, memory=memory)
        found = dataclasses.replace(plan.teacher, model=checkpoint.name)
        plan = dataclasses.replace(plan, teacher=found)
        for number, signals in sorted(damaged.items()):
            done += _Unit(cache.path, part, plan, number).captured(signals)
    outside = [p for p in structure.problems if not p.part]
    return done + [_beyond(problem) for problem in outside]


def _lost(problem: Problem) -> bool:
    """Whether it is none of a unit's signals or of an array's metadata."""
    return problem.signal == ROWS or not problem.signal


def _beyond(problem: Problem) -> Repair:
    if problem.signal == ROWS:
        why = "rows come from the sources, not from the teacher: copy the file from a backup, or "
        why += "capture the corpus again into another directory"
    else:
        why = "no capture makes it: copy it from a backup, or remove what does not belong here"
    return Repair(problem.file, False, why)


def _metadata(cache: Cache, part: Part, structure: Structure) -> Iterator[Repair]:
    """Arrays' metadata, which the manifest decides alone."""
    layout = PartLayout(cache.path / part.path)
    damaged = {p.file for p in structure.problems if p.part == part.path and p.unit is None}
    for name, signal in part.signals.items():
        if isinstance(signal, LogitsSignal):
            continue
        length = cache.manifest.sequence_length
        specs = specs_of(signal, name=name, slots=part.slots, sequence_length=length)
        for array, spec in specs.items():
            file = (layout.array(array) / METADATA).relative_to(cache.path).as_posix()
            if file in damaged:
                create_array(layout.array(array), spec)
                yield Repair(file, True)


class _Unit:
    """One damaged unit."""

    def __init__(self, cache: Path, part: Part, plan: Plan, number: int):
        self.part = part
        self.plan = plan
        self.number = number
        self.layout = PartLayout(cache / part.path)

    def captured(self, signals: Iterable[str]) -> Iterator[Repair]:
        """Each of the damaged signals, with those that it was first captured with."""
        left = set(signals)
        for together in self._passes():
            if not left & together:
                continue
            with tempfile.TemporaryDirectory(prefix="decant-repair-") as scratch:
                staged = PartLayout(Path(scratch) / "part")
                self._capture(together, staged)
                for name in sorted(left & together):
                    yield self._put(name, staged)
            left -= together

    def _passes(self) -> list[set[str]]:
        """Signals that were captured in one go. What shares a program decides its last bits."""
        held = set(self.part.signals)
        first = {name for name in self.plan.signals if name in held}
        added = held - first
        return [first, *([added] if added else [])]

    def _capture(self, together: set[str], staged: PartLayout) -> None:
        staged.root.mkdir()
        for name in ("rows", "statistics"):
            (staged.root / name).symlink_to((self.layout.root / name).resolve())
        plan = dataclasses.replace(
            plan_as_sealed(self.plan, [self.part]),
            signals={n: s for n, s in self.part.signals.items() if n in together},
            statistics=self.part.statistics,
        )
        write_plan(staged.plan, plan)
        for name in plan.arrays:
            for array, spec in plan.specs(name).items():
                create_array(staged.array(array), spec)
        capture_unit(self.number, staged.root, staged.plan)

    def _put(self, name: str, staged: PartLayout) -> Repair:
        """Take over what was made, if it is what the manifest names."""
        where = f"{self.part.path}, unit {self.number}, {name}"
        commit = load_commit(staged.commit(name, self.number))
        sealed = dict(self.part.numbered_units)[self.number].files[name]
        if commit.file != sealed:
            return Repair(
                where,
                False,
                f"captured again it has other bytes (sha256 {commit.file.sha256[:12]}, sealed "
                f"{sealed.sha256[:12]}), so nothing was replaced. {self._machines(name)}",
            )
        for source, target in self._files(name, commit, staged):
            if not target.is_file() or file_sha256(target) != file_sha256(source):
                write_bytes(target, source.read_bytes())
        target = self.layout.commit(name, self.number)
        if not self._stands(name, commit):
            write_bytes(target, staged.commit(name, self.number).read_bytes())
        return Repair(where, True)

    def _files(self, name: str, commit: Commit, staged: PartLayout) -> Iterator[tuple[Path, Path]]:
        if name == LOGITS:
            yield staged.records(name, self.number), self.layout.records(name, self.number)
        for array, shards in commit.shards.items():
            for shard in shards:
                yield staged.array(array) / shard.name, self.layout.array(array) / shard.name

    def _stands(self, name: str, made: Commit) -> bool:
        """Whether the commit on disk says the same, whoever made it."""
        try:
            found = load_commit(self.layout.commit(name, self.number))
        except (ValueError, KeyError, TypeError, OSError):
            return False
        return dataclasses.replace(found, provenance=made.provenance) == made

    def _machines(self, name: str) -> str:
        """Where the unit was captured and where it was now, if its commit can still be read."""
        here = provenance()
        try:
            there = load_commit(self.layout.commit(name, self.number)).provenance
        except (ValueError, KeyError, TypeError, OSError):
            return f"Repair it on a machine like the one that captured it; this one is {here}."
        if there == here:
            return "The rows, the statistics or the code changed since; capture the corpus again."
        return f"It was captured on {there}, this is {here}: repair it on such a machine."
