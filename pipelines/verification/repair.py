"""`verify --repair`: captures damaged or missing units again, to the same bytes.

Capture depends only on plan and rows, so the new files must have the hashes that the manifest
names; files with other hashes are discarded. Units are captured in a temporary directory; the
manifest and undamaged files of the cache stay untouched.
"""

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from decant.pipelines.capture.unit import capture_unit, provenance
from decant.pipelines.teacher.identity import open_teacher_of
from decant.pipelines.verification.structure import Problem, Structure
from decant.schemas import Cache
from decant.schemas.arrays.spec import METADATA, create_array, specs_of
from decant.schemas.disk.array_record import FileEntry
from decant.schemas.disk.atomic import write_bytes
from decant.schemas.disk.identity import file_sha256
from decant.schemas.disk.layout import LOGITS, RECORDS, ROWS, STATISTICS, PartLayout
from decant.schemas.disk.stand_in import Bucket, bucket_of, object_key
from decant.schemas.manifest.commits import Commit, load_commit
from decant.schemas.manifest.manifest import Part, changing_manifest
from decant.schemas.manifest.plan import Plan, plan_as_sealed, read_plan, write_plan
from decant.schemas.signals import RecordSignal


@dataclass(frozen=True)
class Repair:
    """The outcome for one signal of a unit, or for a problem that no capture can repair."""

    where: str
    """Part, unit and signal, or a file below the cache."""
    done: bool
    why: str = ""
    """Why it was not repaired."""


def repair(
    cache: Cache, structure: Structure, *, teacher: str | None, fetch: bool = False, memory: Path
) -> list[Repair]:
    """Capture the damaged units of `structure` again; list the outcome of every problem.

    `teacher` says where the teacher is, if not where the plan has it, `fetch` whether the plan's
    hub id may be fetched; `memory` is the file that
    remembers its hashes. ValueError if it is not the teacher that made the cache.
    """
    done: list[Repair] = []
    seen: set[str] = set()
    for part in cache.manifest.parts:
        if part.path not in seen:  # several parts of a directory share its metadata and plan
            done += _repair_metadata(cache, part, structure)
            problems = [p for p in structure.problems if p.part == part.path]
            done += [_refusal(problem) for problem in problems if _cannot_capture(problem)]
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
            why = _of_another_cache(place)
            done += [Repair(f"{place}, unit {number}", False, why) for number in sorted(damaged)]
            continue
        if not structure.recapturable(part):
            why = "the part's plan or statistics are damaged too: without them nothing is captured"
            done += [
                Repair(f"{part.path}, unit {number}", False, why) for number in sorted(damaged)
            ]
            continue
        if part.aligned:
            why = "no teacher made it: run `decant align` again, into another output"
            done += [
                Repair(f"{part.path}, unit {number}", False, why) for number in sorted(damaged)
            ]
            continue
        plan = read_plan(PartLayout(cache.path / part.path).plan)
        checkpoint = open_teacher_of(cache, part, plan.teacher, teacher, fetch=fetch, memory=memory)
        planned = dataclasses.replace(plan.teacher, model=checkpoint.name)
        plan = dataclasses.replace(plan, teacher=planned)
        for number, signals in sorted(damaged.items()):
            done += _UnitRepair(cache.path, part, plan, number).run(signals)
    outside = [p for p in structure.problems if not p.part]
    return done + [_refusal(problem) for problem in outside]


def _of_another_cache(part: Path) -> str:
    home = part.resolve().parents[1]
    return f"it belongs to another cache: `verify --repair` that one, {home}"


def _cannot_capture(problem: Problem) -> bool:
    """Whether the file is neither a unit's signal nor an array's metadata."""
    return problem.signal == ROWS or not problem.signal


def _refusal(problem: Problem) -> Repair:
    if problem.signal == ROWS:
        why = "rows come from the sources, not from the teacher: copy the file from a backup, or "
        why += "capture the corpus again into another directory"
    else:
        why = "no capture makes it: copy it from a backup, or remove what does not belong here"
    return Repair(problem.file, False, why)


def _repair_metadata(cache: Cache, part: Part, structure: Structure) -> Iterator[Repair]:
    """Write damaged metadata of arrays again, which follows from the manifest alone."""
    layout = PartLayout(cache.path / part.path)
    damaged = {p.file for p in structure.problems if p.part == part.path and p.unit is None}
    for name, signal in part.signals.items():
        if isinstance(signal, RecordSignal):
            continue
        length = cache.manifest.sequence_length
        specs = specs_of(signal, name=name, slots=part.slots, sequence_length=length)
        for array, spec in specs.items():
            file = (layout.array(array) / METADATA).relative_to(cache.path).as_posix()
            if file in damaged:
                if part.in_other_cache:
                    yield Repair(file, False, _of_another_cache(layout.root))
                    continue
                create_array(layout.array(array), spec)
                yield Repair(file, True)


class _UnitRepair:
    """The repair of one damaged unit; `plan` is the part's own, with the teacher's new place."""

    def __init__(self, cache: Path, part: Part, plan: Plan, number: int):
        self.cache = cache
        self.part = part
        self.plan = plan
        self.number = number
        self.layout = PartLayout(cache / part.path)

    def run(self, signals: Iterable[str]) -> Iterator[Repair]:
        """Capture the damaged signals, each together with those it was first captured with."""
        left = set(signals)
        for together in self._passes():
            if not left & together:
                continue
            with tempfile.TemporaryDirectory(prefix="decant-repair-") as scratch:
                staged = PartLayout(Path(scratch) / "part")
                self._capture(together, staged)
                for name in sorted(left & together):
                    yield self._replace(name, staged)
            left -= together

    def _passes(self) -> list[set[str]]:
        """Sets of signals that were captured together.

        Signals of one program are compiled together, which decides the last bits of their values.
        """
        held = set(self.part.signals)
        first = {name for name in self.plan.signals if name in held}
        added = held - first
        return [first, *([added] if added else [])]

    def _capture(self, together: set[str], staged: PartLayout) -> None:
        # Counts that were added later are coded with the logits that are sealed.
        sealed = [LOGITS] if LOGITS not in together else []
        plan = dataclasses.replace(
            plan_as_sealed(self.plan, [self.part]),
            signals={n: s for n, s in self.part.signals.items() if n in together},
            statistics=self.part.statistics,
            coded_with=self.part.logits if sealed else None,
        )
        staged.root.mkdir()
        if bucket := bucket_of(self.cache):
            self._fetch(bucket, plan, sealed, staged)
        else:
            for name in (ROWS, STATISTICS, *sealed):
                (staged.root / name).symlink_to((self.layout.root / name).resolve())
        write_plan(staged.plan, plan)
        for name in plan.arrays:
            for array, spec in plan.specs(name).items():
                create_array(staged.array(array), spec)
        capture_unit(self.number, staged.root, staged.plan)

    def _fetch(self, bucket: Bucket, plan: Plan, sealed: Sequence[str], staged: PartLayout) -> None:
        """Bring what the capture reads to this machine: rows of the unit and of the canaries."""
        units = {self.number, *(unit for unit, _ in plan.canary)}
        files = [(ROWS, number) for number in sorted(units)]
        for name, number in (*files, *((name, self.number) for name in sealed)):
            path, entry = staged.records(name, number), plan.rows.units[number].files[name]
            write_bytes(path, bucket.store.get(object_key(path, entry.sha256), sha256=entry.sha256))
        for file, sha256 in plan.statistics.items():
            path = staged.statistics / file
            write_bytes(path, bucket.store.get(object_key(path, sha256), sha256=sha256))

    def _replace(self, name: str, staged: PartLayout) -> Repair:
        """Copy the new files into the cache, if their hashes are those of the manifest."""
        with changing_manifest(self.cache) as manifest:
            parts = [part for part in manifest.parts if part.path == self.part.path]
            units = {number: unit for part in parts for number, unit in part.numbered_units}
            sealed = units[self.number].files.get(name)
            where = f"{self.part.path}, unit {self.number}, {name}"
            if sealed is None:
                return Repair(where, False, "it was removed meanwhile")
            return self._replace_sealed(name, staged, sealed, where=where)

    def _replace_sealed(
        self, name: str, staged: PartLayout, sealed: FileEntry, *, where: str
    ) -> Repair:
        commit = load_commit(staged.commit(name, self.number))
        if commit.file != sealed:
            return Repair(
                where,
                False,
                f"captured again it has other bytes (sha256 {commit.file.sha256[:12]}, sealed "
                f"{sealed.sha256[:12]}), so nothing was replaced. {self._machines(name)}",
            )
        for source, target in self._files(name, commit, staged):
            # No file stands at a path of a bucket: there all are sent.
            if not target.is_file() or file_sha256(target) != file_sha256(source):
                write_bytes(target, source.read_bytes())
        target = self.layout.commit(name, self.number)
        if not self._has_commit(name, commit):
            write_bytes(target, staged.commit(name, self.number).read_bytes())
        return Repair(where, True)

    def _files(self, name: str, commit: Commit, staged: PartLayout) -> Iterator[tuple[Path, Path]]:
        if name in RECORDS:
            yield staged.records(name, self.number), self.layout.records(name, self.number)
        for array, shards in commit.shards.items():
            for shard in shards:
                yield staged.array(array) / shard.name, self.layout.array(array) / shard.name

    def _has_commit(self, name: str, expected: Commit) -> bool:
        """Whether the commit on disk equals `expected`, apart from its provenance."""
        try:
            present = load_commit(self.layout.commit(name, self.number))
        except (ValueError, KeyError, TypeError, OSError):
            return False
        return dataclasses.replace(present, provenance=expected.provenance) == expected

    def _machines(self, name: str) -> str:
        """Advice that names this machine and, if its commit is readable, that of the capture."""
        here = provenance()
        try:
            there = load_commit(self.layout.commit(name, self.number)).provenance
        except (ValueError, KeyError, TypeError, OSError):
            return f"Repair it on a machine like the one that captured it; this one is {here}."
        if there == here:
            return "The rows, the statistics or the code changed since; capture the corpus again."
        return f"It was captured on {there}, this is {here}: repair it on such a machine."
