"""`remove`: takes signals out of a sealed cache's manifest; `gc` then deletes their files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from decant.schemas.disk.layout import LOGITS
from decant.schemas.manifest.manifest import (
    Manifest,
    Part,
    changing_manifest,
    until_agreed,
    write_manifest,
)
from decant.schemas.manifest.statistics import statistics_of


def remove_signals(cache: Path, names: Sequence[str]) -> Manifest:
    """Replace the manifest by one without the signals `names`; no other file changes.

    ValueError for a signal that the cache does not hold, and for `logits`, which every cache needs.
    """

    def change() -> Manifest:
        with changing_manifest(cache) as manifest:
            new = _without(manifest, names, cache=cache)
            return write_manifest(cache, new, replaces=manifest.cache_id)

    return until_agreed(cache, change)


def _without(manifest: Manifest, names: Sequence[str], *, cache: Path) -> Manifest:
    for name in names:
        if name not in manifest.signals:
            raise ValueError(
                f"{cache}: no signal {name!r}; this cache holds {', '.join(manifest.signals)}"
            )
        if name == LOGITS:
            raise ValueError(f"{cache}: every cache holds logits; delete the directory instead")
    parts = tuple(without_signals(part, set(names)) for part in manifest.parts)
    return dataclasses.replace(manifest, parts=parts)


def without_signals(part: Part, names: set[str]) -> Part:
    """The part without the signals `names`, their files and their statistics."""
    signals = {name: signal for name, signal in part.signals.items() if name not in names}
    dropped = {
        file
        for name, signal in part.signals.items()
        if name in names
        for file in statistics_of(name, signal, part.statistics)
    }
    units = tuple(
        dataclasses.replace(
            unit, files={name: file for name, file in unit.files.items() if name not in names}
        )
        for unit in part.units
    )
    statistics = {file: sha for file, sha in part.statistics.items() if file not in dropped}
    return dataclasses.replace(part, signals=signals, units=units, statistics=statistics)
