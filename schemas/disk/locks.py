"""Locks of a cache: one for commands that change it, one a part directory for captures.

Both are `flock`s, which the operating system releases however their holder ends. They spare waiting
commands an error; what decides is the compare-and-swap of the manifest. Some network file systems
grant a lock to everybody: that is noticed when the first lock is taken, and said.
"""

import contextlib
import fcntl
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from decant.schemas.disk import inside
from decant.schemas.disk.layout import CAPTURE_LOCK, CHANGE_LOCK, cache_of

_turn = threading.RLock()
_held: set[Path] = set()
"""Caches whose change lock this process holds."""
_tried: set[int] = set()
"""Devices whose file system has been tried for locks that do nothing."""


@contextlib.contextmanager
def changing(cache: Path) -> Iterator[None]:
    """Hold the cache's change lock; waits for another process, and says so.

    A holder may enter again. Commands read the manifest after they have entered.
    """
    place = cache.resolve()
    with _turn:
        if place in _held:
            yield
            return
        with _opened(cache, Path(CHANGE_LOCK)) as descriptor:
            _wait(descriptor, fcntl.LOCK_EX, f"{cache}: another command is changing this cache")
            _try_locks(descriptor, cache / CHANGE_LOCK)
            _held.add(place)
            try:
                yield
            finally:
                _held.remove(place)


@contextlib.contextmanager
def capturing(part: Path) -> Iterator[None]:
    """Claim a part directory for a capture; several captures may. Waits for a `gc` that has it."""
    with _opened(*_capture_file(part)) as descriptor:
        _wait(descriptor, fcntl.LOCK_SH, f"{part}: `gc` is changing files of it")
        yield


@contextlib.contextmanager
def uncaptured(part: Path) -> Iterator[bool]:
    """Keep captures of a part directory out; gives False, at once, if one is under way."""
    with _opened(*_capture_file(part)) as descriptor:
        free = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass  # locks do nothing here, as `changing` has said
        yield free


def is_captured(part: Path) -> bool:
    """Whether a capture of a part directory is under way. Works on read-only directories too."""
    try:
        descriptor = os.open(part / CAPTURE_LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _capture_file(part: Path) -> tuple[Path, Path]:
    """A directory that may be reached through links, and the lock file's path below it."""
    file = part / CAPTURE_LOCK
    root = cache_of(part / "plan.json") or part
    return root, file.relative_to(root)


@contextlib.contextmanager
def _opened(root: Path, below: Path) -> Iterator[int]:
    """A descriptor of the lock file `root / below`. A link in its place is an error."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with inside.directory(root, below.parent, make=True) as parent:
        descriptor = os.open(below.name, flags, 0o666, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _wait(descriptor: int, kind: int, why: str) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting: {why}", file=sys.stderr, flush=True)
        fcntl.flock(descriptor, kind)
    except OSError as error:
        _say_that_locks_fail(why.partition(":")[0], str(error))


# A process of its own: where the system makes flock of fcntl's locks, a second descriptor of the
# same process would always get the lock.
_SECOND = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(1)
"""


def _try_locks(descriptor: int, file: Path) -> None:
    """Say it if another process gets the lock that this one holds; once a file system."""
    device = os.fstat(descriptor).st_dev
    if device in _tried:
        return
    _tried.add(device)
    second = subprocess.run([sys.executable, "-S", "-E", "-c", _SECOND, str(file)], check=False)
    if second.returncode == 0:
        _say_that_locks_fail(str(file.parent), "two processes got one lock")


@functools.cache  # once a process and place
def _say_that_locks_fail(where: str, why: str) -> None:
    print(
        f"{where}: locks do nothing on this file system ({why}). Run one command that changes this "
        "cache at a time, and no `gc` beside a capture",
        file=sys.stderr,
        flush=True,
    )
