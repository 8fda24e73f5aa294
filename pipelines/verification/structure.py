"""What a sealed cache's manifest and commits promise, held against every file of it. No teacher."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.upkeep.garbage import unfinished, unnamed
from decant.schemas.arrays.spec import METADATA, ArraySpec, metadata_bytes, specs_of
from decant.schemas.codecs import Tables
from decant.schemas.disk.array_record import FileEntry, RecordReaders
from decant.schemas.disk.atomic import read_json
from decant.schemas.disk.identity import digest, file_sha256
from decant.schemas.disk.layout import LOGITS, MANIFEST, ROWS, TOKENIZER, PartLayout
from decant.schemas.disk.shards import Shard
from decant.schemas.manifest.commits import load_commit, summarise_shards
from decant.schemas.manifest.manifest import Manifest, Part, Unit
from decant.schemas.manifest.plan import read_plan, rows_id_of
from decant.schemas.manifest.statistics import load_tables
from decant.schemas.records.logits import decode_logits, open_logits
from decant.schemas.records.rows import Row, decode_row, loss_mask
from decant.schemas.signals import ArraySignal, LogitsSignal

_LOCK = ".seal.lock"


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was sealed."""

    file: str
    """Below the cache's directory."""
    expected: str
    got: str
    signal: str = ""
    """`rows`, or the signal that cannot be read for it; empty where it belongs to none."""
    part: str = ""
    unit: int | None = None


@dataclass
class Structure:
    """All that was found."""

    problems: list[Problem] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    """Of removed signals and unfinished additions: `gc` deletes them, and readers never look."""
    files: int = 0
    """Files that the cache names."""

    def damaged(self, part: Part) -> dict[int, set[str]]:
        """Signals of each of the part's units that something is wrong with."""
        found: dict[int, set[str]] = {}
        for problem in self.problems:
            if problem.part == part.path and problem.unit is not None:
                found.setdefault(problem.unit, set()).add(problem.signal)
        return found

    def readable(self, part: Part) -> bool:
        """Whether no more than units are damaged: plan, statistics and arrays' metadata are not."""
        return not any(p.part == part.path and p.unit is None for p in self.problems)

    def recapturable(self, part: Part) -> bool:
        """Whether plan and statistics are what they were: what a capture needs beside rows."""
        return not any(
            p.part == part.path and p.unit is None and not p.signal for p in self.problems
        )


SURPLUS = "a file that nothing names"


def check_structure(cache: Path, manifest: Manifest) -> Structure:
    """Every problem of the files of a sealed cache; each file is read once, whole."""
    found = Structure()
    check = _Check(cache, manifest, found)
    check.manifest()
    seen: set[str] = set()
    for part in manifest.parts:
        _PartCheck(check, part).run(whole=part.path not in seen)
        seen.add(part.path)
    check.surplus()
    found.files = len(check.named)
    return found


class _Check:
    """The cache, what its files should be, and the problems so far."""

    def __init__(self, cache: Path, manifest: Manifest, found: Structure):
        self.cache = cache
        self.sealed = manifest
        self.found = found
        self.named: set[Path] = {cache / MANIFEST}

    def problem(self, path: Path, expected: object, got: object, **where) -> None:
        """Note one."""
        file = path.relative_to(self.cache) if path.is_relative_to(self.cache) else path
        self.found.problems.append(Problem(file.as_posix(), str(expected), str(got), **where))

    def manifest(self) -> None:
        """What stands for the whole cache: its id, and the tokenizer beside it."""
        path = self.cache / MANIFEST
        value = {k: v for k, v in read_json(path).items() if k != "cache_id"}
        if digest(value) != self.sealed.cache_id:
            self.problem(path, f"cache_id {digest(value)[:12]}", self.sealed.cache_id[:12])
        directory = self.cache / TOKENIZER
        self.named |= set(directory.glob("*"))
        try:
            tokenizer = Tokenizer.from_files(directory).digest
        except (ValueError, OSError) as error:
            tokenizer = str(error)
        if tokenizer != self.sealed.tokenizer:
            self.problem(directory, f"tokenizer {self.sealed.tokenizer[:12]}", _brief(tokenizer))

    def file(self, path: Path, size: int, sha256: str, **where) -> bool:
        """Whether the file is the one that was committed."""
        self.named.add(path)
        if not path.is_file():
            self.problem(path, f"{size} bytes", "no file", **where)
        elif path.stat().st_size != size:
            self.problem(path, f"{size} bytes", f"{path.stat().st_size} bytes", **where)
        elif (found := file_sha256(path)) != sha256:
            self.problem(path, f"sha256 {sha256[:12]}", f"sha256 {found[:12]}", **where)
        else:
            return True
        return False

    def surplus(self) -> None:
        """Files that nothing names, those apart that `gc` knows how to delete, and of captures that
        are under way."""
        known = [path for path, _ in unnamed(self.cache)]
        under_way = unfinished(self.cache, self.sealed)
        for path in known:
            self.found.left_over.append(path.relative_to(self.cache).as_posix())
        for path in sorted(self.cache.rglob("*")):
            gone = any(path == other or other in path.parents for other in (*known, *under_way))
            if path.is_dir() or gone or path in self.named or path == self.cache / _LOCK:
                continue
            self.problem(path, "no such file", SURPLUS)


class _PartCheck:
    """One part of it."""

    def __init__(self, check: _Check, part: Part):
        self.check = check
        self.part = part
        self.layout = PartLayout(check.cache / part.path)
        self.length = check.sealed.sequence_length
        self.arrays: dict[str, ArraySignal] = {
            n: s for n, s in part.signals.items() if not isinstance(s, LogitsSignal)
        }
        self.specs = {name: self._specs(name) for name in self.arrays}
        self.tables: Tables | None = None

    def run(self, *, whole: bool) -> None:
        """Everything of the part, in the order in which it was written; what its directory has
        once if `whole`."""
        if whole:
            self._plan()
            self._statistics()
        self._load_tables()
        for name, specs in self.specs.items():
            for array, spec in specs.items():
                self._metadata(name, self.layout.array(array) / METADATA, spec)
        for number, unit in self.part.numbered_units:
            rows = self._rows(number, unit)
            if LOGITS in unit.files:
                self._logits(number, unit, rows)
            for name in self.arrays:
                self._shards(name, number, unit)

    def _problem(self, path: Path, expected: object, got: object, **where) -> None:
        self.check.problem(path, expected, got, part=self.part.path, **where)

    def _file(self, path: Path, entry: FileEntry, **where) -> bool:
        return self.check.file(path, entry.bytes, entry.sha256, part=self.part.path, **where)

    def _plan(self) -> None:
        request = self.layout.request
        self.check.named |= {self.layout.plan, request}
        try:
            read_json(request)
        except (ValueError, OSError) as error:
            self._problem(request, "what was asked for", _brief(error))
        if not self.part.signals:
            return  # Nothing was captured: `pipelines tokenise` plans no teacher.
        try:
            plan = read_plan(self.layout.plan)
        except (ValueError, OSError) as error:
            self._problem(self.layout.plan, "the capture's plan", _brief(error))
            return
        for what, sealed, planned in (
            ("rows_id", self.part.rows_id, rows_id_of(plan.rows, self.part.unit_numbers)),
            ("tokenizer", self.check.sealed.tokenizer, plan.tokenizer),
        ):
            if planned != sealed:
                self._problem(self.layout.plan, f"{what} {sealed[:12]}", f"{what} {planned[:12]}")

    def _statistics(self) -> None:
        for name, sha256 in self.part.statistics.items():
            path = self.layout.statistics / name
            size = path.stat().st_size if path.is_file() else 0  # the manifest knows the hash only
            self.check.file(path, size, sha256, part=self.part.path)

    def _load_tables(self) -> None:
        try:
            self.tables = load_tables(self.layout.root, self.part.statistics)
        except ValueError:
            self.tables = None  # a problem already

    def _metadata(self, name: str, path: Path, spec: ArraySpec) -> None:
        if path in self.check.named:
            return  # another part of the directory has it too
        self.check.named.add(path)
        if not path.is_file() or path.read_bytes() != metadata_bytes(spec):
            got = "other metadata" if path.is_file() else "no file"
            self._problem(path, "the array's metadata", got, signal=name)

    def _rows(self, number: int, unit: Unit) -> list[Row]:
        """The unit's rows; none if the file is not the one that was sealed."""
        path, where = self.layout.records(ROWS, number), {"signal": ROWS, "unit": number}
        if not self._file(path, unit.files[ROWS], **where):
            return []
        rows = []
        for offset, record in self._records(path, unit.files[ROWS], unit.rows, where):
            try:
                row, key = decode_row(record, where=f"record {offset}")
            except ValueError as error:
                self._problem(path, "a row", _brief(error), **where)
                continue
            rows.append(row)
            if row.key != key:
                self._problem(path, f"record {offset}: row key {row.key.hex()}", key.hex(), **where)
            for expected, got in self._wrong(row):
                self._problem(path, f"record {offset}: {expected}", got, **where)
        tokens = sum(int((row.segment_ids > 0).sum()) for row in rows)
        scored = sum(int(row.loss_mask.sum()) for row in rows)
        if (tokens, scored) != (unit.tokens, unit.scored):
            expected = f"{unit.tokens} tokens, {unit.scored} of them with targets"
            self._problem(path, expected, f"{tokens}, {scored}", **where)
        return rows

    def _wrong(self, row: Row) -> Iterator[tuple[str, str]]:
        """What is expected of the row, and what it is instead."""
        if len(row.tokens) != self.length:
            yield f"{self.length} positions", str(len(row.tokens))
        size = self.check.sealed.vocabulary_size
        if row.tokens.max(initial=0) >= size:
            yield f"ids below {size}", str(row.tokens.max())
        possible = loss_mask(row.segment_ids, np.ones(len(row.tokens), bool))
        if (row.loss_mask & ~possible).any():
            at = int(np.flatnonzero(row.loss_mask & ~possible)[0])
            yield "targets inside their segment only", f"position {at} has one"

    def _logits(self, number: int, unit: Unit, rows: list[Row]) -> None:
        path, where = self.layout.records(LOGITS, number), {"signal": LOGITS, "unit": number}
        entry = unit.files[LOGITS]
        self._commit(LOGITS, number, unit, entry)
        if not self._file(path, entry, **where):
            return
        records = self._records(path, entry, unit.rows, where)
        if len(rows) != unit.rows or self.tables is None:
            return  # nothing to compare with, which is a problem already
        for (offset, record), row in zip(records, rows, strict=False):
            self._target(path, offset, record, row, unit, where)

    def _target(self, path, offset, record, row: Row, unit: Unit, where: Mapping) -> None:
        assert self.tables is not None
        size = self.check.sealed.vocabulary_size
        try:
            opened = open_logits(record, where=f"record {offset}")
            decode_logits([opened], tables=self.tables, vocabulary=size)
        except ValueError as error:
            self._problem(path, "a record of logits", _brief(error), **where)
            return
        if opened.row_key != row.key:
            expected = f"record {offset}: row key {row.key.hex()}"
            self._problem(path, expected, f"{opened.row_key.hex()}, of another row", **where)
        # A row with NaN has no target where a signal of the same capture had it, but keeps those
        # of an earlier one.
        skipped = offset in unit.skipped_rows and not opened.positions
        if not skipped and not np.array_equal(opened.scored, row.loss_mask):
            expected = f"record {offset}: targets at {int(row.loss_mask.sum())} positions"
            self._problem(path, expected, f"{opened.positions}, or others", **where)

    def _records(
        self, path: Path, entry: FileEntry, rows: int, where: Mapping
    ) -> Iterator[tuple[int, bytes]]:
        """The records that there are, if they are as many as the unit has rows."""
        if entry.records != rows:
            self._problem(path, f"{rows} records", f"{entry.records}", **where)
            return iter(())
        try:
            return iter(enumerate(RecordReaders().read(path, range(rows), expected=entry)))
        except ValueError as error:
            self._problem(path, f"{rows} records", _brief(error), **where)
            return iter(())

    def _shards(self, name: str, number: int, unit: Unit) -> None:
        shards = self._commit(name, number, unit, unit.files[name])
        if shards is None:
            # What the commit would describe is surplus to nobody.
            for array, spec in self.specs[name].items():
                files = self._shard_files(spec, number, unit)
                self.check.named |= {self.layout.array(array) / file for file in files}
            return
        for array, spec in self.specs[name].items():
            directory, of_array = self.layout.array(array), shards.get(array, ())
            expected = self._shard_files(spec, number, unit)
            for shard in of_array:
                self.check.file(
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
                self._problem(path, sorted(expected), sorted(committed), signal=name, unit=number)

    def _shard_files(self, spec: ArraySpec, number: int, unit: Unit) -> set[str]:
        """Names of the files that hold a unit's rows."""
        first = number * self.part.unit_rows
        rows = range(first // spec.shard_rows, -(-(first + unit.rows) // spec.shard_rows))
        return {file for row in rows for file in spec.shard_names(row)}

    def _commit(
        self, name: str, number: int, unit: Unit, entry: FileEntry
    ) -> Mapping[str, tuple[Shard, ...]] | None:
        """The shards of the unit's commit; None if it is not what the manifest was sealed with."""
        path, where = self.layout.commit(name, number), {"signal": name, "unit": number}
        self.check.named.add(path)
        try:
            commit = load_commit(path)
        except (ValueError, KeyError, TypeError, OSError) as error:
            got = _brief(error) if path.is_file() else "no file"
            self._problem(path, "the unit's commit", got, **where)
            return None
        sealed = self.part.signals[name].signal_id
        listed = name in self.arrays
        found = summarise_shards(commit.shards, rows=entry.records) if listed else commit.file
        wrong = [
            (f"unit {number}", f"unit {commit.unit}", commit.unit == number),
            (
                f"signal {sealed[:12]}",
                f"signal {commit.signal_id[:12]}",
                commit.signal_id == sealed,
            ),
            (_entry(entry), _entry(commit.file), commit.file == entry),
            (_entry(entry), _entry(found), found == entry),
            (f"{unit.rows} rows", f"{entry.records}", entry.records == unit.rows),
        ]
        for expected, got, fine in wrong:
            if not fine:
                self._problem(path, expected, got, **where)
        return commit.shards if all(fine for *_, fine in wrong) else None

    def _specs(self, name: str) -> dict[str, ArraySpec]:
        slots, signal = self.part.slots, self.arrays[name]
        return specs_of(signal, name=name, slots=slots, sequence_length=self.length)


def _entry(entry: FileEntry) -> str:
    return f"{entry.bytes} bytes, {entry.records} rows, sha256 {entry.sha256[:12]}"


def _brief(error: object) -> str:
    return str(error)[:160]
