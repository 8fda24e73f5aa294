"""Checks every file of a sealed cache against its manifest and commits, without a teacher."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.upkeep.bucket_garbage import unnamed_objects
from decant.pipelines.upkeep.garbage import own_directories, unfinished, unnamed
from decant.pipelines.verification.record_checks import RecordChecks
from decant.progress import Count, progress
from decant.schemas.arrays.spec import METADATA, ArraySpec, metadata_bytes, specs_of
from decant.schemas.disk.array_record import FileEntry, RecordReaders
from decant.schemas.disk.atomic import read_json
from decant.schemas.disk.identity import file_sha256
from decant.schemas.disk.inside import read_regular
from decant.schemas.disk.layout import (
    CAPTURE_LOCK,
    CHANGE_LOCK,
    MANIFEST,
    RECORDS,
    ROWS,
    TOKENIZER,
    PartLayout,
)
from decant.schemas.disk.locks import is_captured
from decant.schemas.disk.shards import Shard
from decant.schemas.disk.stand_in import bucket_of, exists
from decant.schemas.manifest.commits import (
    Commit,
    is_sealed,
    load_commit,
    named_commit,
    summarise_shards,
)
from decant.schemas.manifest.manifest import Manifest, Part, Unit, manifest_id
from decant.schemas.manifest.plan import read_plan, rows_id_of
from decant.schemas.manifest.tokenizer_files import (
    tokenizer_files,
    tokenizer_folder,
    tokenizer_hashes,
)
from decant.schemas.reading.record_signals import RecordSignals
from decant.schemas.records.rows import Row, decode_row, loss_mask
from decant.schemas.signals import ArraySignal, RecordSignal

_LOCKS = (CHANGE_LOCK, CAPTURE_LOCK)


@dataclass(frozen=True)
class Problem:
    """A file that differs from what was sealed."""

    file: str
    """Path below the cache's directory."""
    expected: str
    got: str
    signal: str = ""
    """The signal that the problem makes unreadable, or `rows`; empty if the file has no signal."""
    part: str = ""
    """The part's path; empty if the file belongs to no part."""
    unit: int | None = None
    """None if the file belongs to no unit."""


@dataclass
class Structure:
    """The result of `check_structure`."""

    problems: list[Problem] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    """Files of removed signals and unfinished additions: readers ignore them, `gc` deletes them."""
    files: int = 0
    """Number of files that the cache should have."""

    def damaged(self, part: Part) -> dict[int, set[str]]:
        """The damaged signals of the part, by unit number."""
        signals: dict[int, set[str]] = {}
        for problem in self.problems:
            if problem.part == part.path and problem.unit is not None:
                signals.setdefault(problem.unit, set()).add(problem.signal)
        return signals

    def readable(self, part: Part) -> bool:
        """Whether plan, statistics and metadata of arrays are undamaged; units may be damaged."""
        return not any(p.part == part.path and p.unit is None for p in self.problems)

    def recapturable(self, part: Part) -> bool:
        """Whether plan and statistics are undamaged, which a capture needs besides the rows."""
        return not any(
            p.part == part.path and p.unit is None and not p.signal for p in self.problems
        )


SURPLUS = "a file that nothing names"
_ERROR_CHARACTERS = 160


def check_structure(
    cache: Path, manifest: Manifest, *, console: Console | None = None
) -> Structure:
    """Check all files of the sealed cache; each one is read once, as a whole.

    Progress goes to `console`.
    """
    structure = Structure()
    check = _CacheCheck(cache, manifest, structure)
    check.check_manifest()
    seen: set[str] = set()
    units = sum(len(part.units) for part in manifest.parts)
    with progress("verify: files", total=units, unit="units", console=console) as checked:
        for part in manifest.parts:
            _PartCheck(check, part).run(whole=part.path not in seen, checked=checked)
            seen.add(part.path)
    check.check_surplus()
    structure.files = len(check.named)
    return structure


class _CacheCheck:
    """Checks files of the whole cache; collects the problems and the paths of expected files."""

    def __init__(self, cache: Path, manifest: Manifest, structure: Structure):
        self.cache = cache
        self.sealed = manifest
        self.structure = structure
        self.named: set[Path] = {cache / MANIFEST}
        self.records = RecordSignals(cache, manifest)

    def add_problem(self, path: Path, expected: object, got: object, **where) -> None:
        """Add a problem; `where` are fields of `Problem`."""
        file = path.relative_to(self.cache) if path.is_relative_to(self.cache) else path
        self.structure.problems.append(Problem(file.as_posix(), str(expected), str(got), **where))

    def check_manifest(self) -> None:
        """Check the manifest's own hash and the tokenizer's digest."""
        path = self.cache / MANIFEST
        if (computed := manifest_id(read_regular(path))) != self.sealed.cache_id:
            self.add_problem(path, f"cache_id {computed[:12]}", self.sealed.cache_id[:12])
        directory = self.cache / TOKENIZER
        self.named |= set(directory.rglob("*"))
        expected = self.sealed.tokenizer
        try:
            tokenizer = Tokenizer.from_files(tokenizer_folder(self.cache))
            got = None if tokenizer.known_as(expected) else tokenizer.digest[:12]
        except (ValueError, OSError) as error:
            got = _shortened(error)
        if got:
            self.add_problem(directory, f"tokenizer {expected[:12]}", got)
        self._check_tokenizer_files(directory)

    def _check_tokenizer_files(self, directory: Path) -> None:
        """Check the files' hashes: decoder and chat template are no part of the digest."""
        try:
            held = tokenizer_hashes(tokenizer_files(self.cache))
        except (ValueError, OSError):
            held = {}
        for name, sha256 in self.sealed.tokenizer_files.items():
            if (got := held.get(name)) != sha256:
                got = f"sha256 {got[:12]}" if got else "no file"
                self.add_problem(directory / name, f"sha256 {sha256[:12]}", got)

    def check_file(self, path: Path, size: int, sha256: str, **where) -> bool:
        """Check size and sha256 of a file; returns whether both are right."""
        self.named.add(path)
        if bucket := bucket_of(path):
            actual = bucket.sha256(path, sha256)
            if actual != sha256:
                got = f"sha256 {actual[:12]}" if actual else "no object"
                self.add_problem(path, f"sha256 {sha256[:12]}", got, **where)
            return actual == sha256
        if not path.is_file():
            self.add_problem(path, f"{size} bytes", "no file", **where)
        elif path.stat().st_size != size:
            self.add_problem(path, f"{size} bytes", f"{path.stat().st_size} bytes", **where)
        elif (actual := file_sha256(path)) != sha256:
            self.add_problem(path, f"sha256 {sha256[:12]}", f"sha256 {actual[:12]}", **where)
        else:
            return True
        return False

    def check_surplus(self) -> None:
        """Find files that nothing names.

        Files that `gc` deletes are listed as left over. Directories in which a capture is
        unfinished or under way are skipped.
        """
        if bucket_of(self.cache):
            # Nothing tells what a capture has just written there.
            self.structure.left_over += unnamed_objects(self.cache, self.sealed).sizes
            return
        parts = own_directories(self.sealed)
        busy = [path for path in parts if is_captured(self.cache / path)]
        known = [path for path, _ in unnamed(self.cache, busy=busy)]
        under_way = [*unfinished(self.cache, self.sealed), *(self.cache / path for path in busy)]
        for path in known:
            self.structure.left_over.append(path.relative_to(self.cache).as_posix())
        for path in sorted(self.cache.rglob("*")):
            ignored = path.name in _LOCKS or any(
                path == other or other in path.parents for other in (*known, *under_way)
            )
            if path.is_dir() or ignored or path in self.named:
                continue
            self.add_problem(path, "no such file", SURPLUS)


class _PartCheck:
    """Checks the files of one part."""

    def __init__(self, check: _CacheCheck, part: Part):
        self.check = check
        self.part = part
        self.layout = PartLayout(check.cache / part.path)
        self.length = check.sealed.sequence_length
        self.arrays: dict[str, ArraySignal] = {
            n: s for n, s in part.signals.items() if not isinstance(s, RecordSignal)
        }
        self.specs = {name: self._specs(name) for name in self.arrays}
        self.record_checks = RecordChecks(check.records, part, check.sealed)
        self.unreadable = not self.record_checks.have_statistics()

    def run(self, *, whole: bool, checked: Count) -> None:
        """Check everything of the part, in the order in which it was written.

        `whole`: also the plan and statistics, which several parts of a directory share. Each unit
        is added to `checked`.
        """
        if whole:
            self._check_plan()
            self._check_statistics()
        for name, specs in self.specs.items():
            for array, spec in specs.items():
                self._check_metadata(name, self.layout.array(array) / METADATA, spec)
        for number, unit in self.part.numbered_units:
            rows = self._check_rows(number, unit)
            self._check_records(number, unit, rows)
            for name in self.arrays:
                self._check_shards(name, number, unit)
            checked.add(1)

    def _add_problem(self, path: Path, expected: object, got: object, **where) -> None:
        self.check.add_problem(path, expected, got, part=self.part.path, **where)

    def _check_file(self, path: Path, entry: FileEntry, **where) -> bool:
        return self.check.check_file(path, entry.bytes, entry.sha256, part=self.part.path, **where)

    def _check_plan(self) -> None:
        request = self.layout.request
        self.check.named.add(request)
        try:
            read_json(request)
        except (ValueError, OSError) as error:
            self._add_problem(request, "what was asked for", _shortened(error))
        if not self.part.signals:
            return  # `decant tokenise` writes rows without a plan
        self.check.named.add(self.layout.plan)
        try:
            plan = read_plan(self.layout.plan)
        except (ValueError, OSError) as error:
            self._add_problem(self.layout.plan, "the capture's plan", _shortened(error))
            return
        for what, sealed, planned in (
            ("rows_id", self.part.rows_id, rows_id_of(plan.rows, self.part.unit_numbers)),
            ("tokenizer", self._tokenizer(plan.tokenizer), plan.tokenizer),
        ):
            if planned != sealed:
                self._add_problem(
                    self.layout.plan, f"{what} {sealed[:12]}", f"{what} {planned[:12]}"
                )

    def _tokenizer(self, planned: str) -> str:
        """The tokenizer's digest that the plan should have, which has `planned`.

        Parts of a merged cache may know the same tokenizer by the digest of another release.
        """
        if planned == self.check.sealed.tokenizer or not self.part.in_other_cache:
            return self.check.sealed.tokenizer
        owner = self.layout.root.resolve().parents[1]
        try:
            theirs, ours = (Tokenizer.from_files(c / TOKENIZER) for c in (owner, self.check.cache))
        except (ValueError, OSError):
            return self.check.sealed.tokenizer
        same = theirs.known_as(planned) and theirs.digest == ours.digest
        return planned if same else self.check.sealed.tokenizer

    def _check_statistics(self) -> None:
        for name, sha256 in self.part.statistics.items():
            path = self.layout.statistics / name
            # The manifest has only the hash.
            size = path.stat().st_size if path.is_file() else 0
            self.check.check_file(path, size, sha256, part=self.part.path)

    def _check_metadata(self, name: str, path: Path, spec: ArraySpec) -> None:
        if path in self.check.named:
            return  # another part of the directory shares it and was checked
        self.check.named.add(path)
        try:
            got = "" if read_regular(path) == metadata_bytes(spec) else "other metadata"
        except (ValueError, OSError):
            got = "no file"
        if got:
            self._add_problem(path, "the array's metadata", got, signal=name)

    def _check_rows(self, number: int, unit: Unit) -> list[Row]:
        """Check the unit's rows and return them; empty if the file's hash is wrong."""
        path, where = self.layout.records(ROWS, number), {"signal": ROWS, "unit": number}
        if not self._check_file(path, unit.files[ROWS], **where):
            return []
        rows = []
        for offset, record in self._records(path, unit.files[ROWS], unit.rows, where):
            try:
                row, key = decode_row(record, where=f"record {offset}", length=self.length)
            except ValueError as error:
                self._add_problem(path, "a row", _shortened(error), **where)
                continue
            rows.append(row)
            if row.key != key:
                self._add_problem(
                    path, f"record {offset}: row key {row.key.hex()}", key.hex(), **where
                )
            for expected, got in self._row_errors(row):
                self._add_problem(path, f"record {offset}: {expected}", got, **where)
        tokens = sum(int((row.segment_ids > 0).sum()) for row in rows)
        scored = sum(int(row.loss_mask.sum()) for row in rows)
        if (tokens, scored) != (unit.tokens, unit.scored):
            expected = f"{unit.tokens} tokens, {unit.scored} of them with targets"
            self._add_problem(path, expected, f"{tokens}, {scored}", **where)
        return rows

    def _row_errors(self, row: Row) -> Iterator[tuple[str, str]]:
        """(expected, got) for every rule that the row breaks."""
        if len(row.tokens) != self.length:
            yield f"{self.length} positions", str(len(row.tokens))
        size = self.check.sealed.vocabulary_size
        if row.tokens.max(initial=0) >= size:
            yield f"ids below {size}", str(row.tokens.max())
        possible = loss_mask(row.segment_ids, np.ones(len(row.tokens), bool))
        if (row.loss_mask & ~possible).any():
            at = int(np.flatnonzero(row.loss_mask & ~possible)[0])
            yield "targets inside their segment only", f"position {at} has one"

    def _check_records(self, number: int, unit: Unit, rows: list[Row]) -> None:
        """Check the unit's records of `logits`, `counts` and `sketch`; `rows` as `_check_rows`."""
        stored = {}
        for name in RECORDS:
            if name in unit.files:
                path, entry = self.layout.records(name, number), unit.files[name]
                where = {"signal": name, "unit": number}
                self._check_commit(name, number, unit, entry)
                if self._check_file(path, entry, **where):
                    stored[name] = dict(self._records(path, entry, unit.rows, where))
        if len(rows) != unit.rows or self.unreadable:
            return  # rows or statistics are damaged, which is a problem already
        for offset, row in enumerate(rows):
            records = {name: of[offset] for name, of in stored.items() if offset in of}
            skipped = offset in unit.skipped_rows
            for name, expected, got in self.record_checks.errors(records, row, skipped=skipped):
                path = self.layout.records(name, number)
                expected = f"record {offset}: {expected}"
                self._add_problem(path, expected, _shortened(got), signal=name, unit=number)

    def _records(
        self, path: Path, entry: FileEntry, rows: int, where: Mapping
    ) -> Iterator[tuple[int, bytes]]:
        """The file's (offset, record) pairs; none if there are not `rows` of them."""
        if entry.records != rows:
            self._add_problem(path, f"{rows} records", f"{entry.records}", **where)
            return iter(())
        try:
            return iter(enumerate(RecordReaders().read(path, range(rows), expected=entry)))
        except ValueError as error:
            self._add_problem(path, f"{rows} records", _shortened(error), **where)
            return iter(())

    def _check_shards(self, name: str, number: int, unit: Unit) -> None:
        shards = self._check_commit(name, number, unit, unit.files[name])
        if shards is None:
            # The commit is damaged: the shards that it should list are not surplus.
            for array, spec in self.specs[name].items():
                files = self._shard_files(spec, number, unit)
                self.check.named |= {self.layout.array(array) / file for file in files}
            return
        for array, spec in self.specs[name].items():
            directory, of_array = self.layout.array(array), shards.get(array, ())
            expected = self._shard_files(spec, number, unit)
            for shard in of_array:
                self.check.check_file(
                    directory / shard.name,
                    shard.bytes,
                    shard.sha256,
                    signal=name,
                    unit=number,
                    part=self.part.path,
                )
            committed = {shard.name for shard in of_array}
            if committed != expected:
                path = self.layout.commit(name, number)
                self._add_problem(
                    path, sorted(expected), sorted(committed), signal=name, unit=number
                )

    def _shard_files(self, spec: ArraySpec, number: int, unit: Unit) -> set[str]:
        """Names of the array's files that hold the unit's rows."""
        first = number * self.part.unit_rows
        rows = range(first // spec.shard_rows, -(-(first + unit.rows) // spec.shard_rows))
        return {file for row in rows for file in spec.shard_names(row)}

    def _check_commit(
        self, name: str, number: int, unit: Unit, entry: FileEntry
    ) -> Mapping[str, tuple[Shard, ...]] | None:
        """Check the unit's commit; returns its shards, or None if anything in it is wrong."""
        path, where = self.layout.commit(name, number), {"signal": name, "unit": number}
        self.check.named.add(path)
        try:
            commit = self._load_commit(name, number, entry)
        except (ValueError, KeyError, TypeError, OSError) as error:
            got = "no file" if isinstance(error, FileNotFoundError) else _shortened(error)
            self._add_problem(path, "the unit's commit", got, **where)
            return None
        sealed = self.part.signals[name].signal_id
        is_array = name in self.arrays
        listed = summarise_shards(commit.shards, rows=entry.records) if is_array else commit.file
        checks = [
            (f"unit {number}", f"unit {commit.unit}", commit.unit == number),
            (
                f"signal {sealed[:12]}",
                f"signal {commit.signal_id[:12]}",
                commit.signal_id == sealed,
            ),
            (_describe(entry), _describe(commit.file), commit.file == entry),
            (_describe(entry), _describe(listed), listed == entry),
            (f"{unit.rows} rows", f"{entry.records}", entry.records == unit.rows),
        ]
        for expected, got, fine in checks:
            if not fine:
                self._add_problem(path, expected, got, **where)
        return commit.shards if all(fine for *_, fine in checks) else None

    def _load_commit(self, name: str, number: int, entry: FileEntry) -> Commit:
        """The commit of the capture, or in a bucket the one that `gc` wrote again."""
        path = self.layout.commit(name, number)
        again = named_commit(self.layout, name, number, entry)
        if bucket_of(path) and not is_sealed(load_commit(path), number, entry) and exists(again):
            return load_commit(again)
        return load_commit(path)

    def _specs(self, name: str) -> dict[str, ArraySpec]:
        slots, signal = self.part.slots, self.arrays[name]
        return specs_of(signal, name=name, slots=slots, sequence_length=self.length)


def _describe(entry: FileEntry) -> str:
    return f"{entry.bytes} bytes, {entry.records} rows, sha256 {entry.sha256[:12]}"


def _shortened(error: object) -> str:
    return str(error)[:_ERROR_CHARACTERS]
