"""The user's own directory on this host, for locks and sockets that no other user may reach.

It lies in the temporary directory, where every user can create entries: a directory that is there
already may have been planted.
"""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_LONGEST_ADDRESS = 100
"""Bytes of a Unix socket's address: 107 on Linux, 103 on macOS."""
_DESCRIPTORS = Path("/proc/self/fd")


def private_directory() -> Path:
    """`decant-UID` in the temporary directory, made now or checked.

    PermissionError if it is a link, belongs to someone else or is open to others, or if others
    could exchange it because the temporary directory is not sticky.
    """
    above = Path(tempfile.gettempdir())
    mode = above.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise PermissionError(
            f"{above}: every user may replace files there (mode {mode & 0o7777:o}, not sticky); "
            "set TMPDIR to a directory of yours"
        )
    directory = above / f"decant-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    if wrong := _why_not_private(found):
        raise PermissionError(
            f"{directory}: {wrong}, so another user may have put it there to take over a capture. "
            "Remove it, or set TMPDIR to a directory of yours"
        )
    return directory


def _why_not_private(found: os.stat_result) -> str:
    if not stat.S_ISDIR(found.st_mode):
        return "is a link or a file and not a directory"
    if found.st_uid != os.getuid():
        return f"belongs to user {found.st_uid}"
    if others := stat.S_IMODE(found.st_mode) & 0o077:
        return f"is open to others (mode {0o700 | others:o}, expected 700)"
    return ""


@contextlib.contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """The address of the Unix socket at `path`, to bind or connect to inside the `with` block.

    A path that is too long for an address is reached through a descriptor of its directory.
    ValueError if this system has no such addresses.
    """
    if len(os.fsencode(path)) <= _LONGEST_ADDRESS:
        yield str(path)
        return
    if not _DESCRIPTORS.is_dir():
        raise ValueError(f"{path}: too long for a Unix socket; set TMPDIR to a shorter path")
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield str(_DESCRIPTORS / str(descriptor) / path.name)
    finally:
        os.close(descriptor)
