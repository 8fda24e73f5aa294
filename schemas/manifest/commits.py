"""That a unit's signal is whole on disk: one JSON, written when everything else of it is.

The manifest holds a `FileEntry` a unit and signal. Of a signal that is an array it sums up the
unit's shards, which are listed here: a large cache has too many of them for its manifest.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from decant.schemas.disk.array_record import FileEntry, require_file
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.disk.identity import digest
from decant.schemas.disk.layout import PartLayout
from decant.schemas.disk.shards import Shard


@dataclass(frozen=True)
class Commit:
    """What a unit and signal came to."""

    unit: int
    signal_id: str
    file: FileEntry
    provenance: dict[str, str]
    skipped_rows: tuple[int, ...] = ()
    """Offsets of rows in which the teacher gave NaN."""
    draws_near_edge: int = 0
    """Draws that other rounding may turn into a neighbouring token; see schemas.targets.draws."""
    shards: dict[str, tuple[Shard, ...]] = field(default_factory=dict)
    """Of a signal that is stored in arrays: their files, by array name."""


def summarise_shards(shards: dict[str, tuple[Shard, ...]], *, rows: int) -> FileEntry:
    """All shards of a unit as one entry: their bytes, the hash of their list, the unit's rows."""
    return FileEntry(
        sum(shard.bytes for of_array in shards.values() for shard in of_array),
        digest({name: [dataclasses.asdict(s) for s in found] for name, found in shards.items()}),
        rows,
    )


def write_commit(part: Path, signal: str, commit: Commit) -> None:
    """Write it; everything that it names must be on disk."""
    write_json(
        PartLayout(part).commit(signal, commit.unit), dataclasses.asdict(commit), kind="commit"
    )


def valid_commit(part: Path, signal: str, unit: int) -> Commit | None:
    """The commit of a unit and signal if it stands: whole, its files there in their sizes."""
    layout = PartLayout(part)
    path = layout.commit(signal, unit)
    if not path.exists():
        return None
    try:
        commit = load_commit(path)
        if not commit.shards:
            require_file(layout.records(signal, unit), commit.file)
        for name, shards in commit.shards.items():
            for shard in shards:
                file = layout.array(name) / shard.name
                require_file(file, FileEntry(shard.bytes, shard.sha256, 0))
    except ValueError:
        return None  # damaged after it was written: captured again
    return commit


def load_commit(path: Path) -> Commit:
    """The commit in a file, nothing checked but the file itself. ValueError if it is damaged."""
    value = read_json(path)
    shards = {
        name: tuple(Shard(**shard) for shard in of_array)
        for name, of_array in value.get("shards", {}).items()
    }
    fields = {
        "file": FileEntry(**value["file"]),
        "skipped_rows": tuple(value["skipped_rows"]),
        "shards": shards,
    }
    return Commit(**{**value, **fields})
