"""`MirroredFile`: a sparse local copy of one object, which holds the ranges that were read.

Beside the file lies its *map*, with one byte for each page of 4 KiB: 1 if the page is here. A page
is written before its byte, so a byte of 1 is true after SIGKILL at any time. A whole byte a page,
because several processes can then set theirs without a lock.

Whoever reads or fetches holds a shared `flock` on the file. `Mirror` takes it alone to delete the
file, and leaves the file if somebody holds it. A handle whose file was deleted opens a new one.
"""

import contextlib
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from pathlib import Path

import numpy as np

from decant.store.base import StoreError

PAGE = 4096
_MOST_PAGES = (8 << 20) // PAGE
"""Pages of one request, so that a long range comes in parallel and little lies in memory."""
PIECE = 256 << 10
"""Bytes that cost about as much as one more request: a link of 200 MB/s carries them in 1.3 ms, and
32 requests at once that wait 20 ms for their answers take 0.6 ms each."""
_GAP_PAGES = PIECE // PAGE
"""Pages that may lie between two ranges that one request fetches."""
_TOUCHED_EVERY = 1.0
"""Seconds between notes of a use."""

Get = Callable[[int, int], bytes]
"""The bytes of the object from a place on, of a length."""


def pieces_of(begin: int, end: int) -> list[tuple[int, int]]:
    """The ranges of `PIECE` bytes, cut at its multiples, in which the bytes lie."""
    return [(at, at + PIECE) for at in range(begin // PIECE * PIECE, end, PIECE)]


def wait_for(futures: Iterable[Future]) -> None:
    """Wait for requests. StoreError if one fails; one that was cancelled may be made again."""
    for future in futures:
        with contextlib.suppress(CancelledError):
            future.result()


class _Descriptor:
    """A file open for reading and writing, made with its folder if missing, closed when dropped.

    Apart from `MirroredFile`, to which weak references lead: these revive what is being dropped.
    """

    def __init__(self, path: Path):
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self.number = os.open(path, flags, 0o600)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.number = os.open(path, flags, 0o600)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "number"):
            close(self.number)


class MirroredFile:
    """One file; threads may share it. All positions are bytes from its beginning."""

    def __init__(self, path: Path, marks: Path, *, size: int, get: Get, pool: Executor):
        """`marks` is the path of the map, `size` that of the object; `get` reads the object."""
        self.path, self.size = path, size
        self._marks_path, self._get, self._pool = marks, get, pool
        self._pages = max(-(-size // PAGE), 1)
        self._lock = threading.RLock()
        self._holders = 0
        self._file: _Descriptor | None = None
        self._map: mmap.mmap | None = None
        self._marks = np.zeros(0, np.uint8)
        self._coming = np.zeros(self._pages, bool)
        self._requests: list[tuple[int, int, Future]] = []
        self._touched = 0.0

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`, fetched first if they are not here. StoreError."""
        with self.held():
            if not self._is_here(begin, end):
                self.ensure([(begin, end)])
            return os.pread(self._descriptor, end - begin, begin)

    def ensure(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch what is not here of (begin, end) ranges. Call it inside `held`. StoreError."""
        ranges = list(ranges)
        while futures := self.start(ranges):
            wait_for(futures)

    def start(self, ranges: Iterable[tuple[int, int]]) -> list[Future]:
        """Begin to fetch what is not here; returns the requests to wait for, also of others."""
        ranges = [span for span in ranges if not self._is_here(*span)]
        if not ranges:
            return []
        with self.held(), self._lock:
            wanted = np.unique(np.concatenate([np.zeros(0, np.int64), *map(self._absent, ranges)]))
            new = wanted[~self._coming[wanted]]
            runs = np.split(new, np.flatnonzero(np.diff(new) > _GAP_PAGES) + 1) if len(new) else []
            for run in runs:
                for first in range(int(run[0]), int(run[-1]) + 1, _MOST_PAGES):
                    self._request(first, min(first + _MOST_PAGES, int(run[-1]) + 1))
            return [
                future
                for first, last, future in self._requests
                if np.searchsorted(wanted, first) < np.searchsorted(wanted, last)
            ]

    def forget(self) -> None:
        """Mark all pages as not here, so that they are fetched again."""
        with self.held():
            self._marks[:] = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody deletes the file inside the block."""
        with self._lock:
            if not self._holders:
                self._hold()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _hold(self) -> None:
        if self._file is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        while self._file is None or not os.fstat(self._descriptor).st_nlink:
            self._open()
        if time.monotonic() - self._touched > _TOUCHED_EVERY:
            os.utime(self._descriptor)
            self._touched = time.monotonic()

    @property
    def _descriptor(self) -> int:
        assert self._file is not None
        return self._file.number

    def _open(self) -> None:
        """Open or make the file and its map, and take the shared lock."""
        self._file = _Descriptor(self.path)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        found = os.fstat(self._descriptor)
        if not found.st_nlink:
            return
        marks = _Descriptor(self._marks_path)
        if os.fstat(marks.number).st_size != self._pages:
            os.truncate(marks.number, self._pages)
        self._map = mmap.mmap(marks.number, self._pages)
        self._marks = np.frombuffer(self._map, np.uint8)
        if found.st_size != self.size:
            # New, or damaged. In this order, because another process may open the file meanwhile.
            self._marks[:] = 0
            os.truncate(self._descriptor, self.size)

    def _is_here(self, begin: int, end: int) -> bool:
        """Whether all of a range is here, as far as the file goes. Only inside `held` will it still
        be so afterwards."""
        first, last = begin // PAGE, -(-min(end, self.size) // PAGE)
        return self._map is not None and self._map.find(b"\0", first, last) < 0

    def _absent(self, span: tuple[int, int]) -> np.ndarray:
        begin, end = span
        first, last = begin // PAGE, -(-min(end, self.size) // PAGE)
        return first + np.flatnonzero(self._marks[first:last] == 0)

    def _request(self, first: int, last: int) -> None:
        self._coming[first:last] = True
        future = self._pool.submit(self._fetch, first, last)
        self._requests.append((first, last, future))
        future.add_done_callback(lambda _: self._came(first, last))

    def _fetch(self, first: int, last: int) -> None:
        begin, end = first * PAGE, min(last * PAGE, self.size)
        with self.held():
            self._write(self._get(begin, end - begin), begin)
            self._marks[first:last] = 1

    def _came(self, first: int, last: int) -> None:
        with self._lock:
            self._coming[first:last] = False
            self._requests = [r for r in self._requests if r[:2] != (first, last)]

    def _write(self, data: bytes, begin: int) -> None:
        left = memoryview(data)
        try:
            while left:
                written = os.pwrite(self._descriptor, left, begin)
                left, begin = left[written:], begin + written
        except OSError as error:
            raise StoreError(
                f"{self.path}: the mirror cannot be written: {error.strerror}. Give it another "
                "place, or fewer bytes"
            ) from None
