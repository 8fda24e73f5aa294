"""Atomic files: write under a temporary name, fsync, rename, fsync the directory.

A path that stands for an object (`stand_in.py`) is written by one request instead.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decant.schemas.disk import inside, steps
from decant.schemas.disk.identity import digest
from decant.schemas.disk.layout import cache_of
from decant.schemas.disk.stand_in import bucket_of
from decant.store.whole_file import flush, temporary_path


@contextlib.contextmanager
def replacing(
    path: Path, *, kind: steps.File = "other", within: Path | None = None
) -> Iterator[Path]:
    """Yield a temporary path that becomes `path`, durably, if the block raises no error.

    Directories between `within` and the file must not be links: ValueError. Unset: the cache, if
    `path` lies in a part of one; else the file's own directory.
    """
    if bucket := bucket_of(path):
        with bucket.scratch_file(path) as temporary:
            yield temporary
            write_bytes(path, temporary.read_bytes(), kind=kind)
        return
    root = within or cache_of(path) or path.parent
    with inside.directory(root, path.parent.relative_to(root), make=True) as parent:
        temporary = temporary_path(path)
        try:
            yield temporary
            steps.file_reached(kind, "written")
            flush(temporary)
            steps.file_reached(kind, "flushed")
            os.replace(temporary.name, path.name, src_dir_fd=parent, dst_dir_fd=parent)
            steps.file_reached(kind, "named")
            os.fsync(parent)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary.name, dir_fd=parent)


def write_bytes(
    path: Path,
    data: bytes,
    *,
    kind: steps.File = "other",
    within: Path | None = None,
    first: bool = False,
) -> bool:
    """Write `data` to `path` atomically; `within` as for `replacing`.

    `first`: in a bucket, an object that is there stays. On a disk, writers of one file write the
    same bytes or hold a lock. Whether the file now holds `data`.
    """
    if bucket := bucket_of(path):
        steps.file_reached(kind, "written")
        stands = bucket.send(path, data, first=first)
        steps.file_reached(kind, "flushed")
        steps.file_reached(kind, "named")
        return stands
    with replacing(path, kind=kind, within=within) as temporary:
        temporary.write_bytes(data)
    return True


def write_json(
    path: Path, value: dict[str, Any], *, kind: steps.File = "other", first: bool = False
) -> bool:
    """Write a JSON object atomically, with a checksum of its own contents; `first` and what it
    returns as for `write_bytes`."""
    return write_bytes(path, json_bytes(value), kind=kind, first=first)


def json_bytes(value: dict[str, Any]) -> bytes:
    """The bytes that `write_json` writes."""
    whole = {**value, "checksum": digest(value)}
    return json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False).encode()


def read_json(path: Path, *, holds: str | None = None) -> dict[str, Any]:
    """The object that `write_json` wrote. ValueError naming the file if it is damaged.

    `holds` is a name that it must have: without it, another file was put in its place.
    """
    return parse_json(inside.read_regular(path), where=path, holds=holds)


def parse_json(data: bytes, *, where: Path | str, holds: str | None = None) -> dict[str, Any]:
    """As `read_json`, of the bytes of a file that `where` names in errors."""
    try:
        value = json.loads(data)
        checksum = value.pop("checksum")
        computed = digest(value)
    # ValueError: not JSON, not UTF-8, or a lone surrogate, which JSON text can contain.
    # RecursionError: thousands of brackets.
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError(f"{where}: damaged, not the JSON object that was written") from None
    if computed != checksum:
        raise ValueError(f"{where}: checksum mismatch; the file was damaged or edited")
    if holds is not None and holds not in value:
        raise ValueError(f"{where}: without {holds!r}, so it is another file under this name")
    return value
