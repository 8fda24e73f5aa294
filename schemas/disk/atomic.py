"""Atomic files: write under a temporary name, fsync, rename, fsync the directory."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decant.schemas.disk import steps
from decant.schemas.disk.identity import digest


@contextlib.contextmanager
def replacing(path: Path, *, kind: steps.File = "other") -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path`, durably, if the block raises no error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        steps.file_reached(kind, "written")
        _fsync(temporary)
        steps.file_reached(kind, "flushed")
        temporary.replace(path)
        steps.file_reached(kind, "named")
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """Rename a finished file durably. A file at `target` is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
    _fsync(target.parent)


def write_bytes(path: Path, data: bytes, *, kind: steps.File = "other") -> None:
    """Write `data` to `path` atomically."""
    with replacing(path, kind=kind) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: dict[str, Any], *, kind: steps.File = "other") -> None:
    """Write a JSON object atomically, with a checksum of its own contents."""
    whole = {**value, "checksum": digest(value)}
    text = json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False)
    write_bytes(path, text.encode(), kind=kind)


def read_json(path: Path) -> dict[str, Any]:
    """The object that `write_json` wrote. ValueError naming the file if it is damaged."""
    try:
        value = json.loads(path.read_bytes())
        checksum = value.pop("checksum")
        computed = digest(value)
    # ValueError: not JSON, not UTF-8, or a lone surrogate, which JSON text can contain.
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{path}: damaged, not the JSON object that was written") from None
    if computed != checksum:
        raise ValueError(f"{path}: checksum mismatch; the file was damaged or edited")
    return value


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
