"""Progress goes to the caller's console, for the calibration as for the capture."""

import io
import time

import pytest
from rich.console import Console

from decant.pipelines.capture import progress
from decant.pipelines.capture.job import precompute
from decant.pipelines.capture.progress import row_progress
from decant.pipelines.teacher.rows_done import rows_done
from tests.making.caches import tiny_settings


def test_both_steps_have_a_bar_on_the_given_terminal_and_nothing_is_printed_elsewhere(
    tmp_path, capfd
):
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    precompute(tiny_settings(tmp_path), console=screen)
    shown = screen.file.getvalue()
    rows = 101
    assert "calibrate" in shown
    assert "64/64" in shown  # 4,096 tokens in rows of 64
    assert f"{rows}/{rows}" in shown
    assert capfd.readouterr().out == ""


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    paper = Console(file=io.StringIO(), soft_wrap=True)
    with row_progress("calibrate", rows=8, tokens=800, console=paper):
        rows_done.add(3)
        deadline = time.monotonic() + 20
        while "3 of 8" not in paper.file.getvalue():
            assert time.monotonic() < deadline
    assert "calibrate: 3 of 8 rows" in paper.file.getvalue()


@pytest.mark.parametrize("committed", [2, 7])
def test_rows_of_other_workers_count_when_they_are_committed(committed):
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    with row_progress("capture", rows=9, tokens=9, console=screen, committed=lambda: committed):
        rows_done.add(4)
    assert f"{max(4, committed)}/9" in screen.file.getvalue()
