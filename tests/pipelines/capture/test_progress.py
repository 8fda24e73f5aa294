"""Progress goes to the caller's console, for the calibration as for the capture."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from decant.pipelines.capture.job import precompute
from decant.pipelines.capture.progress import row_progress, tokenise_progress
from decant.pipelines.config import Corpus
from decant.pipelines.rows.shard import TokeniseJob, shard_commit
from decant.pipelines.rows.sources import find_sources
from decant.pipelines.teacher.rows_done import rows_done
from tests.making.caches import tiny_settings
from tests.paths import environment


def test_both_steps_have_a_bar_on_the_given_terminal_and_nothing_is_printed_elsewhere(
    tmp_path, capfd
):
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    precompute(tiny_settings(tmp_path), console=screen)
    shown = screen.file.getvalue()
    rows = 101
    assert "calibrate" in shown
    assert "64 of 64 rows" in shown  # 4,096 tokens in rows of 64
    assert f"{rows} of {rows} rows" in shown
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("committed", [2, 7])
def test_rows_of_other_workers_count_when_they_are_committed(committed):
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    with row_progress("capture", rows=9, tokens=9, console=screen, committed=lambda: committed):
        rows_done.add(4)
    assert f"{max(4, committed)} of 9 rows" in screen.file.getvalue()


def test_rows_of_other_processes_count_before_their_unit_is_committed(tmp_path):
    part = tmp_path / "parts" / "0000"
    code = (
        "import sys; from pathlib import Path; from decant.pipelines.teacher import rows_done\n"
        "rows_done.rows_done.add(5, part=Path(sys.argv[1]))"
    )
    other = [sys.executable, "-c", code, str(part)]
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    subprocess.run(other, env=environment(), check=True)  # of an earlier capture: not counted
    with row_progress("capture", rows=9, tokens=9, console=screen, part=part):
        rows_done.add(1, part=part)
        subprocess.run(other, env=environment(), check=True)
    assert "6 of 9 rows" in screen.file.getvalue()
    assert len(list((part / "work/rows-done").iterdir())) == 2  # a process with a bar writes none


def test_tokenising_shows_the_bytes_of_the_shards_that_are_done(tmp_path):
    text = tmp_path / "a.jsonl"
    text.write_text('{"text": "abc"}\n' * 200_000)
    sources = find_sources([str(text)], max_bytes=None, memory=tmp_path / "memory.json")
    corpus = Corpus(shard_bytes=1 << 20)
    job = TokeniseJob(tmp_path, tmp_path, tuple(sources), corpus, unit_rows=4, vocabulary=9)
    first = shard_commit(job, 0)
    first.parent.mkdir()
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    with tokenise_progress(job, console=screen):
        first.write_text("")
    assert "1,049 of 3,200 kB" in screen.file.getvalue()
