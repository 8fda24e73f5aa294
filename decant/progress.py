"""Shows how far long work is: a bar on a terminal, elsewhere a line every half minute.

For display only. Progress and notices go to standard error, so that standard output holds a
command's result alone.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from decant.foreign import terminal

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")
Number = int | float

LINE_SECONDS = 30.0
"""Seconds between two lines if there is no terminal."""
_POLL_SECONDS = 0.5
_WINDOW_SECONDS = 120.0
"""The rate is that of the last two minutes, so that an early slow step does not spoil it."""


def notices(*, quiet: bool = False) -> "Console":
    """The console for progress and notices: standard error, or nothing if `quiet`."""
    return terminal(stderr=True, quiet=quiet, soft_wrap=True, highlight=False)


class Count:
    """How much is done, added to from any thread."""

    def __init__(self) -> None:
        self.done: Number = 0
        self._lock = threading.Lock()

    def add(self, amount: Number) -> None:
        """Add to `done`."""
        with self._lock:
            self.done += amount


@contextlib.contextmanager
def progress(
    what: str,
    *,
    total: Number,
    unit: str,
    console: "Console | None",
    before: Number = 0,
    count: Callable[[], Number] | None = None,
    tokens_each: Number = 0,
) -> Iterator[Count]:
    """Show on `console` how far the `with` block is; yields the `Count` that it adds to.

    None as console shows nothing.

    `what` names the work, `total` its size in `unit`s, `before` the units that an earlier run has
    done. `count()` is asked for the units done, `before` included, in place of the yielded Count.
    With `tokens_each`, tokens in a unit, the rate is shown in tokens too.
    """
    added = Count()
    if console is None or console.quiet:
        yield added
        return
    from rich.progress import BarColumn, Progress, TextColumn

    stop = threading.Event()
    speed = Speed(before)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[now]}")
    on_terminal = console.is_terminal

    def now() -> tuple[Number, str]:
        done = min(count() if count else before + added.done, total)
        speed.see(done)
        return done, speed.text(done, total=total, unit=unit, tokens_each=tokens_each)

    with Progress(*columns, console=console, disable=not on_terminal) as bar:
        task = bar.add_task(what, total=total, now="")
        bar.update(task, completed=before)

        def watch() -> None:
            printed = time.monotonic()
            while not stop.wait(_POLL_SECONDS):
                done, text = now()
                bar.update(task, completed=done, now=text)
                if not on_terminal and time.monotonic() - printed > LINE_SECONDS:
                    printed = time.monotonic()
                    console.print(f"{what}: {text}")

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield added
        finally:
            stop.set()
            watcher.join()
            done, text = now()
            bar.update(task, completed=done, now=text)


@contextlib.contextmanager
def track(
    items: Iterable[Item],
    what: str,
    *,
    total: Number,
    unit: str,
    console: "Console | None",
    each: Callable[[Item], Number] = lambda item: 1,
) -> Iterator[Iterator[Item]]:
    """The items, in a `with` block that `progress` is shown for.

    `each(item)` units are done when the next item is asked for.
    """
    with progress(what, total=total, unit=unit, console=console) as count:

        def counted() -> Iterator[Item]:
            for item in items:
                yield item
                count.add(each(item))

        yield counted()


class Speed:
    """Units a second, over the last two minutes of work."""

    def __init__(self, before: Number):
        self._began = time.monotonic()
        self._before = before
        # From the first change on: loading and compiling come before it.
        self._seen: deque[tuple[float, Number]] = deque()

    def see(self, done: Number) -> None:
        """Take note that `done` units are done now."""
        last = self._seen[-1][1] if self._seen else self._before
        if done > last:
            self._seen.append((time.monotonic(), done))
        while len(self._seen) > 2 and self._seen[-1][0] - self._seen[1][0] > _WINDOW_SECONDS:
            self._seen.popleft()

    @property
    def rate(self) -> float:
        """Units a second; 0 while none is done."""
        if not self._seen:
            return 0.0
        began, first = self._seen[0] if len(self._seen) > 1 else (self._began, self._before)
        ended, last = self._seen[-1]
        return (last - first) / max(ended - began, 1e-9)

    def text(self, done: Number, *, total: Number, unit: str, tokens_each: Number = 0) -> str:
        """`120 of 400 rows, 2.5 rows/s, 1,280 tokens/s, 1:52 left`."""
        parts = [f"{done:,.0f} of {total:,.0f} {unit}"]
        if rate := self.rate:
            parts.append(f"{rate:,.3g} {unit}/s" if rate < 100 else f"{rate:,.0f} {unit}/s")
            parts += [f"{rate * tokens_each:,.0f} tokens/s"] if tokens_each else []
            parts.append(f"{duration((total - done) / rate)} left")
        else:
            parts.append(f"{duration(time.monotonic() - self._began)} so far")
        return ", ".join(parts)


def duration(seconds: Number) -> str:
    """Seconds as 4:05, 1:04:05, or 3 days 4 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
