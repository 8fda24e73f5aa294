"""A live bar of a capture: rows, rows/s, tokens/s, time left, and what was done before.

Only for the eye; what is certain stands in the commits. Rows of this process are counted as they
are encoded; units of workers elsewhere appear with their commits.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_POLL_SECONDS = 0.5
_LOG_SECONDS = 30.0


class Counter:
    """Rows that this process has done, added to from worker threads."""

    def __init__(self):
        self.rows = 0
        self._lock = threading.Lock()

    def add(self, rows: int) -> None:
        """Count some more."""
        with self._lock:
            self.rows += rows


done_here = Counter()


@contextlib.contextmanager
def capture_progress(
    *, rows: int, tokens: int, before: int, committed: Callable[[], int]
) -> Iterator[None]:
    """Show progress over `rows` of which `before` were done by an earlier run.

    `tokens` is their number, for the rate; `committed()` counts rows with a commit. Without a
    terminal a line is printed every half minute instead.
    """
    console = Console(soft_wrap=True, highlight=False)
    start, began = done_here.rows, time.monotonic()
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
                done = max(before + done_here.rows - start, committed())
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
