"""The progress bar of a calibration or a capture: rows, rows/s, tokens/s, time left.

For display only; the commits decide what is done. Rows of this process are counted as they are
encoded, rows of other workers when their unit is committed.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from decant.pipelines.teacher.rows_done import rows_done

_POLL_SECONDS = 0.5
_LOG_SECONDS = 30.0


@contextlib.contextmanager
def row_progress(
    what: str,
    *,
    rows: int,
    tokens: int,
    console: Console,
    before: int = 0,
    committed: Callable[[], int] = lambda: 0,
) -> Iterator[None]:
    """Show on `console` how far a teacher is with `rows` rows, which have `tokens` tokens in all.

    `what` names the step. An earlier run has done `before` of the rows. `committed()` returns the
    number of rows in committed units, `before` included. Without a terminal, a line is printed
    every 30 seconds.
    """
    start, began = rows_done.rows, time.monotonic()
    tokens_a_row = tokens / max(rows, 1)
    stop = threading.Event()
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows  {task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )

    def rows_now() -> int:
        return max(before + rows_done.rows - start, committed())

    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=rows, completed=before, rate="")

        def watch() -> None:
            logged = time.monotonic()
            while not stop.wait(_POLL_SECONDS):
                done = rows_now()
                rate = (done - before) / (time.monotonic() - began)
                text = f"{rate:.1f} rows/s  {rate * tokens_a_row:,.0f} tokens/s"
                bar.update(task, completed=min(done, rows), rate=text)
                if not console.is_terminal and time.monotonic() - logged > _LOG_SECONDS:
                    logged = time.monotonic()
                    left = f", {(rows - done) / rate:.0f} s left" if rate else ""
                    console.print(f"{what}: {done} of {rows} rows, {text}{left}")

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()
            bar.update(task, completed=min(rows_now(), rows))
