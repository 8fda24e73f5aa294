"""Finds files in a cache's directory that its manifest does not name, for `gc` to delete."""

import os
import stat
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from decant.schemas.disk.layout import PARTS, RECORDS, REQUEST, STAGED, PartLayout
from decant.schemas.manifest.manifest import Manifest, Part, read_manifest
from decant.schemas.manifest.plan import additions
from decant.schemas.signals import array_names


def unnamed(cache: Path, *, busy: Container[str] = ()) -> Iterator[tuple[Path, int]]:
    """Files and directories that the manifest does not name, each with its size in bytes.

    Directories in which a capture is unfinished are left out, and parts whose path is in `busy`.
    """
    manifest = read_manifest(cache)
    if (staged := cache / STAGED).exists():
        yield staged, _size(staged)
    under_way = unfinished(cache, manifest)
    for directory, parts in own_directories(manifest).items():
        layout = PartLayout(cache / directory)
        if layout.root not in under_way and directory not in busy:
            yield from ((path, _size(path)) for path in _unnamed_paths(layout, parts))


def unfinished(cache: Path, manifest: Manifest) -> list[Path]:
    """Part directories with an unfinished capture: begun but not sealed, or sealed in part."""
    sealed = {cache / path: parts for path, parts in own_directories(manifest).items()}
    begun = [
        path.parent
        for path in sorted((cache / PARTS).glob(f"*/{REQUEST}"))
        if path.parent not in sealed
    ]
    sealed_in_part = [
        root
        for root, parts in sealed.items()
        if parts[0].planned_units > sum(len(part.units) for part in parts)
    ]
    return [*begun, *sealed_in_part]


def own_directories(manifest: Manifest) -> dict[str, list[Part]]:
    """The cache's own parts, by the path of their directory."""
    directories: dict[str, list[Part]] = {}
    for part in manifest.parts:
        if not part.in_other_cache:
            directories.setdefault(part.path, []).append(part)
    return directories


def _unnamed_paths(layout: PartLayout, parts: Sequence[Part]) -> Iterator[Path]:
    arrays = {
        array
        for part in parts
        for name, signal in part.signals.items()
        for array in array_names(name, signal)
    }
    for path in layout.arrays:
        if path.relative_to(layout.root).as_posix() not in arrays:
            yield path
    for name in RECORDS:
        if not any(name in part.signals for part in parts):
            path = layout.root / name
            yield from [path] if path.exists() else []
    commits = {
        layout.commit(name, number)
        for part in parts
        for name in part.signals
        for number in part.unit_numbers
    }
    yield from (path for path in sorted(layout.commits.glob("*")) if path not in commits)
    statistics = {name for part in parts for name in part.statistics}
    yield from (p for p in sorted(layout.statistics.glob("*")) if p.name not in statistics)
    yield from additions(layout)


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a directory; links count as nothing."""
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(_regular_bytes(file) for file in files)


def _regular_bytes(path: Path) -> int:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return 0  # another command has deleted it meanwhile
    return found.st_size if stat.S_ISREG(found.st_mode) else 0
