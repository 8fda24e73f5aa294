"""Files that appear whole or not at all: written beside their final name, then renamed to it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def temporary_path(path: Path) -> Path:
    """A name beside `path` that no other writer uses: hidden, and it ends with `.tmp`."""
    return path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether the file may be one that somebody is still writing."""
    return path.name.startswith(".") and path.suffix == ".tmp"


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary path in the directory of `path`, which is made; what is left there is deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write `path`: readers see the old bytes or the new ones. A power cut may lose the file."""
    with beside(path) as temporary:
        temporary.write_bytes(data)
        temporary.replace(path)


def flush(path: Path) -> None:
    """Make a file's bytes, or the names in a directory, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
