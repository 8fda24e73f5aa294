"""The rows that processes have run the teacher on, for progress bars.

A process counts its own rows. Workers in other processes also write their counts to files, because
only whole units have commits, and a unit may take many minutes.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from decant.schemas.disk.atomic import write_bytes
from decant.schemas.disk.layout import PartLayout, cache_of
from decant.schemas.disk.stand_in import bucket_of

_WRITE_SECONDS = 2.0


class Counter:
    """Counts rows, from any thread."""

    def __init__(self):
        self.rows = 0
        self._written = 0.0
        self._watched = 0
        self._lock = threading.Lock()

    def add(self, rows: int, *, part: Path | None = None) -> None:
        """Add `rows` to the count; tell it to other processes that capture `part`."""
        with self._lock:
            self.rows += rows
            due = time.monotonic() - self._written > _WRITE_SECONDS
            if part is None or self._watched or not due:
                return
            self._written = time.monotonic()
            count = self.rows
        with contextlib.suppress(OSError):  # only a bar depends on it
            file = _counts(part) / f"{socket.gethostname()}-{os.getpid()}"
            if bucket_of(part):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(str(count))
            else:
                write_bytes(file, str(count).encode(), within=cache_of(file))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While this process shows a bar, it need not write its count."""
        self._watched += 1
        try:
            yield
        finally:
            self._watched -= 1


rows_done = Counter()


def rows_of_others(part: Path) -> int:
    """The sum of the counts that other processes have written for `part`."""
    total = 0
    for file in _counts(part).glob("*-*"):
        with contextlib.suppress(OSError, ValueError):
            total += int(file.read_text())
    return total


def _counts(part: Path) -> Path:
    """Where the counts lie. Of a cache in a bucket only processes of this host tell theirs."""
    bucket = bucket_of(part)
    work = PartLayout(bucket.scratch / part.name if bucket else part).work
    return work / "rows-done"
