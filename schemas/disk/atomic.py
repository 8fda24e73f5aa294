"""Files that are whole or absent: temporary name, write, fsync, rename, fsync of the directory."""

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
    """A temporary name that becomes `path`, durably, when the block ends without an error."""
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
    """Give a whole file another name, durably; what had it is gone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
    _fsync(target.parent)


def write_bytes(path: Path, data: bytes, *, kind: steps.File = "other") -> None:
    """Write `data` to `path`, whole or not at all."""
    with replacing(path, kind=kind) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: dict[str, Any], *, kind: steps.File = "other") -> None:
    """Write a JSON object that carries its own checksum."""
    whole = {**value, "checksum": digest(value)}
    text = json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False)
    write_bytes(path, text.encode(), kind=kind)


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote. ValueError naming the file if it is damaged."""
    try:
        value = json.loads(path.read_bytes())
        checksum = value.pop("checksum")
        found = digest(value)
    # ValueError: no JSON, no UTF-8, or half of a surrogate pair, which JSON may hold.
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{path}: damaged, not the JSON object that was written") from None
    if found != checksum:
        raise ValueError(f"{path}: checksum mismatch; the file was damaged or edited")
    return value


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
