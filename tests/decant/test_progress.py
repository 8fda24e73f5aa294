"""How far long work is: a bar on a terminal, lines elsewhere, nothing for the quiet."""

import io
import time

from rich.console import Console

from decant import progress
from decant.progress import Speed, duration, track


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def wait_for(text: str, console: Console) -> None:
    deadline = time.monotonic() + 20
    while text not in shown(console):
        assert time.monotonic() < deadline, shown(console)
        time.sleep(0.01)


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    paper = Console(file=io.StringIO(), soft_wrap=True)
    with progress.progress("read", total=8, unit="rows", console=paper) as count:
        wait_for("read: 0 of 8 rows, 0:00 so far", paper)
        count.add(3)
        wait_for("read: 3 of 8 rows", paper)
    assert "rows/s" in shown(paper)
    assert " left" in shown(paper)


def test_lines_are_half_a_minute_apart(monkeypatch):
    assert progress.LINE_SECONDS == 30
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.01)
    paper = Console(file=io.StringIO(), soft_wrap=True)
    with track(range(3), "read", total=3, unit="rows", console=paper) as items:
        assert list(items) == [0, 1, 2]
    assert shown(paper) == ""


def test_a_terminal_has_a_bar_and_the_quiet_have_nothing():
    for quiet in (False, True):
        screen = Console(file=io.StringIO(), force_terminal=True, width=120, quiet=quiet)
        shows = {"total": 9, "unit": "rows", "console": screen, "each": lambda _: 4}
        with track("ab", "read", **shows) as items:
            assert list(items) == ["a", "b"]
        assert ("8 of 9 rows" in shown(screen)) is not quiet


def test_the_rate_is_that_of_the_last_two_minutes_without_the_time_before_the_first(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    speed = Speed(before=10)
    now = 100.0  # loading and compiling
    speed.see(12)
    assert speed.rate == 2 / 100
    for now in range(101, 400):
        speed.see(12 + (now - 100) * 3)
    assert speed.rate == 3
    text = speed.text(909, total=1209, unit="rows", tokens_each=512)
    assert text == "909 of 1,209 rows, 3 rows/s, 1,536 tokens/s, 1:40 left"


def test_long_times_are_in_days():
    assert [duration(s) for s in (65, 3665, 5 * 86400)] == ["1:05", "1:01:05", "5 days 0 h"]
