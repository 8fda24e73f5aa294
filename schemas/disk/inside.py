"""Open, read, move and delete files inside a directory without following links below it.

A cache may come from a stranger. A link in it, such as `parts/0000/commits` to a home directory,
must not lead a command to write or delete elsewhere. Directories are opened one by one, each
relative to the one above, so that a link on the way is an error.
"""

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from decant.schemas.disk.stand_in import bucket_of

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextlib.contextmanager
def directory(root: Path, below: Path, *, make: bool = False) -> Iterator[int]:
    """A descriptor of the directory `root / below`; `root` itself may be reached through links.

    `make` makes directories that are missing. ValueError if a directory below `root` is a link or
    `below` leads out of `root`; FileNotFoundError if it is missing.
    """
    if below.is_absolute() or ".." in below.parts:
        raise ValueError(f"{root / below}: is not inside {root}")
    if make:
        root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        at = root
        for name in below.parts:
            at /= name
            inner = _open_inner(descriptor, name, at, make=make)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def _open_inner(descriptor: int, name: str, at: Path, *, make: bool) -> int:
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=descriptor)
    try:
        return os.open(name, _DIRECTORY, dir_fd=descriptor)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise ValueError(
                f"{at}: is a link or no directory. A cache is changed only where it holds "
                "directories of its own; put the files there instead of the link"
            ) from None
        raise


def remove(root: Path, below: Path) -> None:
    """Delete the file or directory `root / below`, of a link the link itself.

    Does nothing if it is missing. ValueError if a directory on the way is a link.
    """
    with contextlib.suppress(FileNotFoundError), directory(root, below.parent) as parent:
        _remove(parent, below.name)


def _remove(parent: int, name: str) -> None:
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=parent)
        return
    descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        for inner in _names(descriptor):
            _remove(descriptor, inner)
    finally:
        os.close(descriptor)
    os.rmdir(name, dir_fd=parent)


def _names(descriptor: int) -> list[str]:
    """Names in an open directory, in order."""
    with os.scandir(descriptor) as entries:
        return sorted(entry.name for entry in entries)


def move(root: Path, source: Path, target: Path) -> None:
    """Rename the file `root / source` to `root / target`, durably.

    A file at `target` is replaced; its directory is made if needed.
    """
    with (
        directory(root, source.parent) as source_parent,
        directory(root, target.parent, make=True) as target_parent,
    ):
        os.replace(source.name, target.name, src_dir_fd=source_parent, dst_dir_fd=target_parent)
        os.fsync(target_parent)


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file; ValueError for anything else.

    A device or pipe in a stranger's cache would be read for ever. FileNotFoundError.
    """
    if bucket := bucket_of(path):
        return bucket.read(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path}: not a regular file")
        return file.read()


def file_facts(root: Path, below: Path) -> tuple[int, str] | None:
    """Size and sha256 of the regular file `root / below`; None if there is none, or a link."""
    try:
        with directory(root, below.parent) as parent:
            descriptor = os.open(below.name, _FILE, dir_fd=parent)
    except (OSError, ValueError):
        return None
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return None
        return found.st_size, hashlib.file_digest(file, "sha256").hexdigest()


def regular_files(root: Path, below: Path, *, most: int) -> dict[str, bytes]:
    """Contents of the regular files in the directory `root / below` and its directories, by name.

    The name of a file in an inner directory is `inner/name`; directories in those, links and
    devices are left out. ValueError if the files have more than `most` bytes together, or if a
    directory on the way is a link.
    """
    contents: dict[str, bytes] = {}
    with directory(root, below) as descriptor:
        for name, data in _regular_files(descriptor, "", most=most):
            contents[name] = data
            most -= len(data)
            if most < 0:
                raise ValueError(f"{root / below}: its files are too large, at {name}")
    return contents


def _regular_files(descriptor: int, inside: str, *, most: int) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of files; of a file larger than `most`, one byte more than that."""
    for name in _names(descriptor):
        mode = os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode
        if stat.S_ISREG(mode):
            with os.fdopen(os.open(name, _FILE, dir_fd=descriptor), "rb") as file:
                # No more than the file holds, because Python allocates what is asked for.
                size = os.fstat(file.fileno()).st_size
                yield inside + name, file.read(min(size, most) + 1)
        elif stat.S_ISDIR(mode) and not inside:
            inner = os.open(name, _DIRECTORY, dir_fd=descriptor)
            try:
                yield from _regular_files(inner, f"{name}/", most=most)
            finally:
                os.close(inner)
