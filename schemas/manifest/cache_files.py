"""The files of a sealed cache, each with its hash: what belongs to it, wherever it lies."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from decant.schemas.arrays.spec import METADATA, metadata_bytes, specs_of
from decant.schemas.disk.array_record import FileEntry
from decant.schemas.disk.atomic import parse_json
from decant.schemas.disk.layout import RECORDS, ROWS, TOKENIZER, PartLayout
from decant.schemas.disk.stand_in import is_data, object_key
from decant.schemas.manifest.commits import sealed_commit
from decant.schemas.manifest.manifest import Manifest, Part
from decant.schemas.signals import RecordSignal

Read = Callable[[str], bytes]
"""Gives the bytes of a small file of the cache by its key. FileNotFoundError if it is missing."""


@dataclass(frozen=True)
class CacheFile:
    """A file of a cache."""

    key: str
    """Path below the cache, with slashes."""
    sha256: str
    bytes: int | None = None
    """Size; None if the manifest has only the hash."""
    again: str = ""
    """Of a commit in a bucket: the key of its object, if it is a `named_commit`."""

    def object(self, *, by_content: bool) -> str:
        """The key of its object in a cache whose data are named by their content, or not."""
        path = Path(self.key)
        if by_content and self.again:
            return self.again
        return object_key(path, self.sha256) if by_content and is_data(path) else self.key


def claims(manifest: Manifest, read: Read) -> Iterator[CacheFile]:
    """The file of each part's directory that says which capture the directory is for."""
    for layout in dict.fromkeys(_layout(part) for part in manifest.parts):
        yield _of_json(layout.request, read)


def cache_files(manifest: Manifest, read: Read) -> Iterator[CacheFile]:
    """All files of the cache but the manifest and `claims`, in the order in which they were made.

    ValueError for a plan or commit that is damaged or is not the one that was sealed.
    """
    for name, sha256 in manifest.tokenizer_files.items():
        yield CacheFile(f"{TOKENIZER}/{name}", sha256)
    seen: set[str] = set()
    for part in manifest.parts:
        # Several parts of one directory share its plan and statistics.
        for file in _of_part(part, manifest, read):
            if file.key not in seen:
                seen.add(file.key)
                yield file


def commit_keys(manifest: Manifest) -> Iterator[str]:
    """Keys of the commits of the captures, in the order in which `cache_files` reads them."""
    for part in manifest.parts:
        for number, _ in part.numbered_units:
            for name in part.signals:
                yield _key(_layout(part).commit(name, number))


def _of_part(part: Part, manifest: Manifest, read: Read) -> Iterator[CacheFile]:
    layout, length, by_content = _layout(part), manifest.sequence_length, manifest.by_content
    if part.signals:  # `decant tokenise` writes rows without a plan
        yield _of_json(layout.plan, read)
    for name, sha256 in part.statistics.items():
        yield CacheFile(_key(layout.statistics / name), sha256)
    for name, signal in part.signals.items():
        if not isinstance(signal, RecordSignal):
            specs = specs_of(signal, name=name, slots=part.slots, sequence_length=length)
            for array, spec in specs.items():
                yield _of_bytes(layout.array(array) / METADATA, metadata_bytes(spec))
    for number, unit in part.numbered_units:
        yield _of_entry(layout.records(ROWS, number), unit.files[ROWS])
        for name in part.signals:
            yield from _of_signal(layout, name, number, unit.files[name], read, by_content)


def _of_signal(
    layout: PartLayout, name: str, number: int, entry: FileEntry, read: Read, by_content: bool
) -> Iterator[CacheFile]:
    """The files of a unit and signal, then their commit."""
    commit, place, data = sealed_commit(
        layout, name, number, entry, lambda path: read(_key(path)), by_content=by_content
    )
    if name in RECORDS:
        yield _of_entry(layout.records(name, number), entry)
    for array, shards in commit.shards.items():
        for shard in shards:
            yield CacheFile(_key(layout.array(array) / shard.name), shard.sha256, shard.bytes)
    path = layout.commit(name, number)
    again = _key(place) if place != path else ""
    yield dataclasses.replace(_of_bytes(path, data), again=again)


def _layout(part: Part) -> PartLayout:
    return PartLayout(Path(part.path))


def _key(path: Path) -> str:
    return path.as_posix()


def _of_entry(path: Path, entry: FileEntry) -> CacheFile:
    return CacheFile(_key(path), entry.sha256, entry.bytes)


def _of_json(path: Path, read: Read) -> CacheFile:
    """A file whose hash the manifest does not have; it has a checksum of its own."""
    data = read(_key(path))
    parse_json(data, where=path)
    return _of_bytes(path, data)


def _of_bytes(path: Path, data: bytes) -> CacheFile:
    return CacheFile(_key(path), hashlib.sha256(data).hexdigest(), len(data))
