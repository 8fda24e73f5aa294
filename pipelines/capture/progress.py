"""The progress bar of a capture: rows, rows/s, tokens/s, time left.

For display only; the commits decide what is done. Rows of this process are counted as they are
encoded, rows of other workers when their unit is committed.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from decant.foreign import terminal

_POLL_SECONDS = 0.5
_LOG_SECONDS = 30.0


class Counter:
    """Counts the rows that this process has captured, from any thread."""

    def __init__(self):
        self.rows = 0
        self._lock = threading.Lock()

    def add(self, rows: int) -> None:
        """Add `rows` to the count."""
        with self._lock:
            self.rows += rows


rows_done = Counter()


@contextlib.contextmanager
def capture_progress(
    *, rows: int, tokens: int, before: int, committed: Callable[[], int]
) -> Iterator[None]:
    """Show progress over a capture of `rows` rows with `tokens` tokens in all.

    An earlier run has done `before` of the rows. `committed()` returns the number of rows in
    committed units, `before` included. Without a terminal, a line is printed every 30 seconds.
    """
    console = terminal(soft_wrap=True, highlight=False)
    start, began = rows_done.rows, time.monotonic()
    tokens_a_row = tokens / max(rows, 1)
    stop = threading.Event()
    columns = (
        TextColumn("capture"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows  {task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("capture", total=rows, completed=before, rate="")

        def watch() -> None:
            logged = time.monotonic()
            while not stop.wait(_POLL_SECONDS):
                done = max(before + rows_done.rows - start, committed())
                rate = (done - before) / (time.monotonic() - began)
                text = f"{rate:.1f} rows/s  {rate * tokens_a_row:,.0f} tokens/s"
                bar.update(task, completed=min(done, rows), rate=text)
                if not console.is_terminal and time.monotonic() - logged > _LOG_SECONDS:
                    logged = time.monotonic()
                    left = f", {(rows - done) / rate:.0f} s left" if rate else ""
                    console.print(f"capture: {done} of {rows} rows, {text}{left}")

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()
            bar.update(task, completed=min(committed(), rows))
