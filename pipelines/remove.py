"""Taking signals out of a sealed cache: unlinked from the manifest first, deleted by `gc`."""

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from schemas.layout import PARTS, REQUEST, STAGED, PartLayout
from schemas.manifest import Manifest, Part, read_manifest, write_manifest
from schemas.signals import HiddenSignal, array_names


def remove_signals(cache: Path, names: Sequence[str]) -> Manifest:
    """Seal the cache again without these signals; no file but the manifest changes.

    ValueError for one that it does not hold, and for `logits`, which every cache has.
    """
    manifest = read_manifest(cache)
    for name in names:
        if name not in manifest.signals:
            raise ValueError(
                f"{cache}: no signal {name!r}; this cache holds {', '.join(manifest.signals)}"
            )
        if name == "logits":
            raise ValueError(f"{cache}: every cache holds logits; delete the directory instead")
    parts = tuple(without_signals(part, set(names)) for part in manifest.parts)
    new = dataclasses.replace(manifest, parts=parts)
    return write_manifest(cache, new, replaces=manifest.cache_id)


def unnamed(cache: Path) -> Iterator[tuple[Path, int]]:
    """Files and directories of signals that the manifest does not name, each with its bytes."""
    manifest = read_manifest(cache)
    if (staged := cache / STAGED).exists():
        yield staged, _size(staged)
    under_way = unfinished(cache, manifest)
    for directory, parts in _directories(manifest).items():
        layout = PartLayout(cache / directory)
        if layout.root not in under_way:
            yield from ((path, _size(path)) for path in _unnamed_of(layout, parts))


def unfinished(cache: Path, manifest: Manifest) -> list[Path]:
    """Directories of parts in which a capture is under way: begun, or sealed in part."""
    found = _directories(manifest)
    sealed = {cache / path: parts for path, parts in found.items()}
    begun = [
        path.parent
        for path in sorted((cache / PARTS).glob(f"*/{REQUEST}"))
        if path.parent not in sealed
    ]
    open_ = [
        root
        for root, parts in sealed.items()
        if parts[0].planned_units > sum(len(part.units) for part in parts)
    ]
    return [*begun, *open_]


def _directories(manifest: Manifest) -> dict[str, list[Part]]:
    """The cache's own parts by path."""
    found: dict[str, list[Part]] = {}
    for part in manifest.parts:
        if not part.elsewhere:
            found.setdefault(part.path, []).append(part)
    return found


def delete(path: Path) -> None:
    """Remove a file or a directory with all that is in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _unnamed_of(layout: PartLayout, parts: Sequence[Part]) -> Iterator[Path]:
    arrays = {
        array
        for part in parts
        for name, signal in part.signals.items()
        for array in array_names(name, signal)
    }
    for path in layout.arrays:
        if path.relative_to(layout.root).as_posix() not in arrays:
            yield path
    commits = {
        layout.commit(name, number)
        for part in parts
        for name in part.signals
        for number in part.unit_numbers
    }
    yield from (path for path in sorted(layout.commits.glob("*")) if path not in commits)
    statistics = {name for part in parts for name in part.statistics}
    yield from (p for p in sorted(layout.statistics.glob("*")) if p.name not in statistics)
    yield from layout.additions


def without_signals(part: Part, names: set[str]) -> Part:
    """The part as a manifest describes it that does not name these."""
    signals = {name: signal for name, signal in part.signals.items() if name not in names}
    dropped = {
        signal.directions
        for name, signal in part.signals.items()
        if name in names and isinstance(signal, HiddenSignal)
    }
    units = tuple(
        dataclasses.replace(
            unit, files={name: file for name, file in unit.files.items() if name not in names}
        )
        for unit in part.units
    )
    statistics = {file: sha for file, sha in part.statistics.items() if file not in dropped}
    return dataclasses.replace(part, signals=signals, units=units, statistics=statistics)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
