"""The number of rows that this process has run the teacher on, for progress bars."""

import threading


class Counter:
    """Counts rows, from any thread."""

    def __init__(self):
        self.rows = 0
        self._lock = threading.Lock()

    def add(self, rows: int) -> None:
        """Add `rows` to the count."""
        with self._lock:
            self.rows += rows


rows_done = Counter()
