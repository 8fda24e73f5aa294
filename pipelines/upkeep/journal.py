"""The journal of a `gc`: which units it replaces. With it the exchange of files is all or nothing.

`gc` writes new files to a staging folder, then `gc.json` with the manifest that describes them.
While the journal exists the cache cannot be opened. `settle` moves the files and replaces the
manifest; it can be stopped anywhere and called again. It does so only if every file of every
replaced unit is staged or in place with the size and hash that the new manifest names.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from decant.schemas.disk import inside, steps
from decant.schemas.disk.array_record import FileEntry
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.disk.layout import JOURNAL, RECORDS, ROWS, STAGED, PartLayout
from decant.schemas.disk.names import require_names
from decant.schemas.disk.steps import Step
from decant.schemas.manifest.commits import load_commit, summarise_shards
from decant.schemas.manifest.manifest import (
    Manifest,
    Part,
    Unit,
    manifest_from_json,
    manifest_to_json,
    read_manifest,
    write_manifest,
)
from decant.schemas.manifest.plan import CANARY

_STAGED, _MOVES = "staged", "moves"


@dataclass(frozen=True)
class Journal:
    """A `gc` that may have begun to move files."""

    staged: Path
    """The folder with the new files, below the cache."""
    manifest: Manifest
    """The manifest with the new units."""


@dataclass(frozen=True)
class _Replaced:
    """A unit that a journal replaces."""

    part: Part
    number: int
    old: Unit
    new: Unit


def new_staging_folder(cache: Path) -> Path:
    """Make a folder for new files; its path below the cache. No other `gc` has the same."""
    below = Path(STAGED) / os.urandom(8).hex()
    with inside.directory(cache, below, make=True):
        return below


def write_journal(cache: Path, staged: Path, manifest: Manifest) -> None:
    """Write the journal of a `gc` whose new files lie in the folder `staged`, below the cache."""
    value = {_STAGED: staged.name, "manifest": manifest_to_json(manifest)}
    write_json(cache / JOURNAL, value, kind="journal")


def settle(cache: Path) -> str | None:
    """Finish the `gc` whose journal is in the cache, or drop the journal if nothing was moved.

    Returns a sentence for the user if it was dropped. ValueError that says what to do if some files
    were replaced and others are lost. The caller must hold the cache's change lock.
    """
    if not (cache / JOURNAL).exists():
        return None
    present = read_manifest(cache, during_gc=True)
    try:
        journal = _read_journal(cache)
        new = _rebased(present, journal.manifest)
        replaced = list(_replaced(present, new))
        moves = [move for each in replaced for move in _moves(cache, journal.staged, each)]
    except ValueError as problem:
        _require_unmoved(cache, present, problem)
        _drop(cache)
        return (
            f"{cache}: an earlier `gc` was stopped before it moved a file, and cannot be finished "
            f"({problem}); begun again"
        )
    for below in moves:
        inside.move(cache, journal.staged / below, below)
        steps.reached(Step.FILE_MOVED)
    if new != present:
        write_manifest(cache, new, replaces=present.cache_id)
    steps.reached(Step.OVERWRITTEN)
    _drop(cache)
    return None


def _drop(cache: Path) -> None:
    # The journal first: without it the staged files are only left over.
    inside.remove(cache, Path(JOURNAL))
    inside.remove(cache, Path(STAGED))


def _read_journal(cache: Path) -> Journal:
    path = cache / JOURNAL
    value = read_json(path)
    try:
        # Releases before 0.8 staged all files in one folder and listed the moves.
        require_names("file of a unit", value.get(_MOVES, ()))
        if _MOVES not in value:
            require_names("staging folder", [value[_STAGED]])
        new = {name: field for name, field in value["manifest"].items() if name != "version"}
        return Journal(Path(STAGED, value.get(_STAGED, "")), manifest_from_json(new))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not a journal: {error}") from error


def _rebased(present: Manifest, planned: Manifest) -> Manifest:
    """The present manifest with the files of the units that `planned` describes.

    Anything else that was sealed since `planned` was made is kept.
    """
    own = [part for part in planned.parts if not part.in_other_cache]
    directories = {part.path: part for part in own}
    units = {(part.path, number): unit for part in own for number, unit in part.numbered_units}
    parts = []
    for part in present.parts:
        other = directories.get(part.path)
        if other is None or part.in_other_cache:
            parts.append(part)
            continue
        same = {ROWS} | {n for n, s in part.signals.items() if other.signals.get(n) == s}
        renewed = tuple(
            _renewed(unit, units.get((part.path, number), unit), same)
            for number, unit in part.numbered_units
        )
        statistics = part.statistics
        if not any(name.startswith(CANARY) for name in other.statistics):
            statistics = {n: sha for n, sha in statistics.items() if not n.startswith(CANARY)}
        parts.append(dataclasses.replace(part, units=renewed, statistics=statistics))
    return dataclasses.replace(present, parts=tuple(parts))


def _renewed(unit: Unit, other: Unit, names: set[str]) -> Unit:
    files = {n: other.files.get(n, f) if n in names else f for n, f in unit.files.items()}
    return dataclasses.replace(unit, scored=other.scored, files=files)


def _replaced(present: Manifest, new: Manifest) -> Iterator[_Replaced]:
    for before, part in zip(present.parts, new.parts, strict=True):
        for (number, old), unit in zip(before.numbered_units, part.units, strict=True):
            if old.files != unit.files:
                yield _Replaced(part, number, old, unit)


def _moves(cache: Path, staged: Path, unit: _Replaced) -> Iterator[Path]:
    """Files below the cache that must be moved there from the folder `staged`.

    ValueError naming a file that is neither staged nor in place as the new manifest describes it.
    """
    for below, is_right in _files(cache, unit.part, unit.number, unit.new, staged=staged):
        if is_right(staged / below):
            yield below
        elif not is_right(below):
            raise ValueError(f"{cache / staged / below} is missing or damaged")


def _require_unmoved(cache: Path, present: Manifest, problem: ValueError) -> None:
    """ValueError unless all files of units with forgotten documents are as the manifest says."""
    for part in present.parts:
        if part.in_other_cache or not part.forgotten:
            continue
        for number, unit in part.numbered_units:
            for below, is_right in _files(cache, part, number, unit):
                if not is_right(below):
                    raise ValueError(
                        f"{problem}; and {cache / below} is not the file that the manifest names, "
                        f"so `gc` had begun to replace files. Bring {cache / STAGED} back and run "
                        f"`gc` again, or delete {cache / JOURNAL}: the cache then opens, and "
                        "`verify` lists the units that cannot be read"
                    ) from problem


def _files(
    cache: Path, part: Part, number: int, unit: Unit, *, staged: Path | None = None
) -> Iterator[tuple[Path, Callable[[Path], bool]]]:
    """Every file of the unit: its path below the cache, and a check of a file in its place.

    The commit that lists the shards of an array is read after it was yielded, in its place or from
    the folder `staged`.
    """
    layout = PartLayout(Path(part.path))
    for name, entry in unit.files.items():
        if name in (ROWS, *RECORDS):
            yield layout.records(name, number), _holds(cache, entry.bytes, entry.sha256)
        if name == ROWS:
            continue
        below, is_commit = layout.commit(name, number), _is_commit(cache, entry)
        yield below, is_commit
        if name in RECORDS:
            continue
        place = staged / below if staged and is_commit(staged / below) else below
        for array, shards in load_commit(cache / place).shards.items():
            for shard in shards:
                yield layout.array(array) / shard.name, _holds(cache, shard.bytes, shard.sha256)


def _holds(cache: Path, size: int, sha256: str) -> Callable[[Path], bool]:
    return lambda below: inside.file_facts(cache, below) == (size, sha256)


def _is_commit(cache: Path, entry: FileEntry) -> Callable[[Path], bool]:
    """Whether a file is the commit of a unit and signal that the manifest describes by `entry`."""

    def check(below: Path) -> bool:
        if inside.file_facts(cache, below) is None:
            return False
        try:
            commit = load_commit(cache / below)
        except (ValueError, OSError):
            return False
        listed = summarise_shards(commit.shards, rows=entry.records)
        return commit.file == entry and (not commit.shards or listed == entry)

    return check
