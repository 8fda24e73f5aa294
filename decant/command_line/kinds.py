"""Tells caches, runs and sweeps apart, so that one in another's place is an error that helps."""

import dataclasses
from pathlib import Path
from typing import Any

MARKS = {"run": "run.json", "cache": "manifest.json", "sweep": "comparison.json"}
"""By kind of directory: the file that every finished one holds."""
_REMEDIES = {
    "run": "`decant report {path}` shows a run, `decant evaluate {path}` judges its student",
    "cache": "`decant inspect {path}` shows a cache, `decant train --cache {path}` learns from it",
    "sweep": "`decant report {path}` compares its students; each has its run in a directory of it",
}


def kind_of(path: Path) -> str | None:
    """What the directory holds: `run`, `cache` or `sweep`; None if none of them, or not there."""
    return next((kind for kind, mark in MARKS.items() if (path / mark).is_file()), None)


def require_kinds(settings: Any) -> None:
    """ValueError if a cache is named where a run is meant, or the reverse."""
    for field in dataclasses.fields(settings):
        value, meant = getattr(settings, field.name), field.metadata.get("holds")
        for path in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(path):
                require_kinds(path)
            elif meant and path is not None and kind_of(path) not in (None, *meant):
                raise ValueError(f"{field.name}: {wrong_kind(path, meant[0])}")


def wrong_kind(path: Path, meant: str) -> str:
    """That `path` holds another kind than is meant, and the commands that take it."""
    kind = kind_of(path)
    return f"{path} is a {kind}, not a {meant}: {_REMEDIES[str(kind)].format(path=path)}"
