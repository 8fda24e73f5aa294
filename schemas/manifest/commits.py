"""Commits: one JSON per unit and signal, written after all files of that unit and signal.

The manifest holds one `FileEntry` per unit and signal. For a signal stored in arrays this entry
summarises the unit's shards, and the commit lists them: a large cache has too many shards for its
manifest.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decant.schemas.disk.array_record import FileEntry, as_json, require_file
from decant.schemas.disk.atomic import parse_json, write_json
from decant.schemas.disk.identity import digest
from decant.schemas.disk.inside import read_regular
from decant.schemas.disk.layout import PartLayout
from decant.schemas.disk.names import require_names, require_unit_numbers
from decant.schemas.disk.shards import Shard
from decant.schemas.disk.stand_in import bucket_of
from decant.schemas.manifest import bounds


@dataclass(frozen=True)
class Commit:
    """The files of one unit and signal, with facts about their capture."""

    unit: int
    signal_id: str
    file: FileEntry
    provenance: dict[str, str]
    skipped_rows: tuple[int, ...] = ()
    """Offsets of rows for which the teacher produced NaN."""
    draws_near_edge: int = 0
    """Draws that other rounding may turn into a neighbouring token; see `targets/draws.py`."""
    shards: dict[str, tuple[Shard, ...]] = field(default_factory=dict)
    """For a signal stored in arrays: the files of each array, by array name."""


def summarise_shards(shards: dict[str, tuple[Shard, ...]], *, rows: int) -> FileEntry:
    """One entry for a unit's shards by array: total bytes, hash of the list, the unit's rows."""
    return FileEntry(
        sum(shard.bytes for array in shards.values() for shard in array),
        digest({name: [dataclasses.asdict(s) for s in array] for name, array in shards.items()}),
        rows,
    )


def write_commit(part: Path, signal: str, commit: Commit, *, first: bool = False) -> bool:
    """Write a commit. The files that it names must be there. `first` and what it returns as for
    `write_bytes`."""
    path = PartLayout(part).commit(signal, commit.unit)
    return write_json(path, as_json(commit), kind="commit", first=first)


def write_commits(part: Path, commits: Mapping[str, Commit]) -> None:
    """Write a unit's commits, by signal.

    In a bucket the commits of the first worker stay. But if it did not write them all, or if files
    that they name are gone, all are replaced: counts are coded with the logits beside them, so a
    unit's signals must come from one worker.
    """
    stand = [write_commit(part, name, commit, first=True) for name, commit in commits.items()]
    if all(stand):
        return
    if any(stand) or not all(valid_commit(part, n, commit.unit) for n, commit in commits.items()):
        for name, commit in commits.items():
            write_commit(part, name, commit)


def valid_commit(part: Path, signal: str, unit: int) -> Commit | None:
    """The commit of a unit and signal, or None.

    None if the commit is missing or damaged, or if a file that it names is missing or has another
    size.
    """
    layout = PartLayout(part)
    path = layout.commit(signal, unit)
    try:
        commit = load_commit(path)
        if not commit.shards:
            require_file(layout.records(signal, unit), commit.file)
        for name, shards in commit.shards.items():
            for shard in shards:
                file = layout.array(name) / shard.name
                require_file(file, FileEntry(shard.bytes, shard.sha256, 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return None  # damaged after it was written: capture does this unit again
    return commit


def named_commit(layout: PartLayout, signal: str, unit: int, sealed: FileEntry) -> Path:
    """In a bucket: the commit of a unit whose files were written again after the capture.

    Readers by an older manifest need the commit of the capture, which stays in its place.
    """
    path = layout.commit(signal, unit)
    return path.with_name(f"{path.stem}.{sealed.sha256[:16]}.json")


def write_commit_again(part: Path, signal: str, commit: Commit) -> None:
    """Write the commit of a unit whose files were written again; in a bucket a `named_commit`."""
    if bucket_of(part) is None:
        write_commit(part, signal, commit)
        return
    path = named_commit(PartLayout(part), signal, commit.unit, commit.file)
    write_json(path, as_json(commit), kind="commit")


def is_sealed(commit: Commit, unit: int, entry: FileEntry) -> bool:
    """Whether it is the commit of a unit that the manifest describes by `entry`."""
    shards = commit.shards
    held = summarise_shards(shards, rows=entry.records) if shards else commit.file
    return commit.unit == unit and held == entry


def sealed_commit(
    layout: PartLayout,
    signal: str,
    unit: int,
    entry: FileEntry,
    read: Callable[[Path], bytes],
    *,
    by_content: bool,
) -> tuple[Commit, Path, bytes]:
    """The commit of a unit that the manifest describes by `entry`, its place and its bytes.

    `read` gives the bytes of a file of the cache, or FileNotFoundError. ValueError if there is none
    or another one.
    """
    place = layout.commit(signal, unit)
    data = read(place)
    commit = parse_commit(data, where=place)
    if not is_sealed(commit, unit, entry) and by_content:
        with contextlib.suppress(FileNotFoundError):
            place = named_commit(layout, signal, unit, entry)
            data = read(place)
            commit = parse_commit(data, where=place)
    if not is_sealed(commit, unit, entry):
        raise ValueError(
            f"{layout.commit(signal, unit)}: not the commit of {signal}, unit {unit}, that the "
            "manifest names"
        )
    return commit, place, data


def load_commit(path: Path) -> Commit:
    """The commit at `path`; the files that it names are not checked. ValueError if damaged."""
    return parse_commit(read_regular(path), where=path)


def parse_commit(data: bytes, *, where: Path | str) -> Commit:
    """As `load_commit`, of the bytes of a file that `where` names in errors."""
    value = parse_json(data, where=where)
    try:
        return _commit_from_json(value)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: not a commit: {error}") from error


def _commit_from_json(value: dict[str, Any]) -> Commit:
    require_unit_numbers([value["unit"]])
    shards = {
        name: tuple(Shard(**shard) for shard in of_array)
        for name, of_array in value.get("shards", {}).items()
    }
    require_names("array", shards)
    require_names("shard file", [shard.name for of_array in shards.values() for shard in of_array])
    fields = {
        "file": FileEntry(**value["file"]),
        "skipped_rows": tuple(value["skipped_rows"]),
        "shards": shards,
    }
    commit = Commit(**{**value, **fields})
    bounds.require_sha256("signal_id", commit.signal_id)
    bounds.require_entry("the unit", commit.file)
    bounds.require_offsets("skipped_rows", commit.skipped_rows, bounds.ROWS)
    bounds.require_number("draws_near_edge", commit.draws_near_edge, 0, bounds.BYTES)
    return commit
