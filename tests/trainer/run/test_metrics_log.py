"""Metrics in files and in the terminal; `metrics.jsonl` has each step once, whatever happened."""

import itertools
import json

import pytest

from decant.trainer.run import metrics_log
from decant.trainer.run.metrics_log import MetricsLog, Place, read_metrics
from tests.formulas.events import shown_by_tensorboard

HELDOUT = ("heldout_kl_bound", "heldout_ce", "heldout_perplexity", "heldout_agreement")


def line(step, **more):
    return {"step": step, "loss": 1.0, "kl_loss": 1.0, "ce_loss": 1.0, **more}


def write(run, *, after, steps, loss=1.0, seconds=(), evaluate=(), **mode):
    metrics = MetricsLog(run, after=after, steps=9, **mode)
    for number, step in enumerate(steps):
        taken = seconds[number] if seconds else 2.0
        metrics.log_update(line(step, loss=loss, tokens_per_second=1.0, step_seconds=taken))
        if step in evaluate:
            metrics.log_heldout({"step": step, **dict.fromkeys(HELDOUT, loss)})
    metrics.close()


def test_continuing_from_a_checkpoint_drops_the_lines_after_it(tmp_path):
    write(tmp_path, after=None, steps=[1, 2, 3, 4, 5], loss=1.0)
    write(tmp_path, after=3, steps=[4, 5, 6], loss=2.0)
    got = [(line["step"], line["loss"]) for line in read_metrics(tmp_path)]
    assert got == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_a_run_killed_before_its_first_checkpoint_starts_a_new_file(tmp_path):
    write(tmp_path, after=None, steps=[1, 2], loss=1.0)
    write(tmp_path, after=None, steps=[1], loss=2.0)
    assert [line["loss"] for line in read_metrics(tmp_path)] == [2.0]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(1)) + '\n{"step": 2, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[" * 10**5])
def test_a_damaged_line_is_an_error_with_the_files_name(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl: damaged"):
        read_metrics(tmp_path)


def test_values_that_are_not_finite_are_null_in_json(tmp_path):
    write(tmp_path, after=None, steps=[1], loss=float("nan"))
    assert '"loss": null' in (tmp_path / "metrics.jsonl").read_text()


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not the directory of a run"):
        read_metrics(tmp_path / "elsewhere")


def test_quiet_prints_nothing(tmp_path, capsys):
    write(tmp_path, after=None, steps=[1, 2], evaluate=[2], quiet=True)
    assert capsys.readouterr() == ("", "")
    assert len(read_metrics(tmp_path)) == 3


def test_without_a_terminal_the_first_the_last_and_a_line_every_half_minute_is_printed(
    tmp_path, capsys, monkeypatch
):
    now = itertools.count(0, 10)
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: next(now))
    write(tmp_path, after=None, steps=range(1, 10))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [int(line.split()[1]) for line in printed.err.splitlines()] == [1, 4, 7, 9]
    assert len(read_metrics(tmp_path)) == 9


def test_the_held_out_lines_keep_to_the_half_minute_too(tmp_path, capsys):
    write(tmp_path, after=None, steps=range(1, 10), evaluate=range(1, 10))
    held = [line for line in capsys.readouterr().err.splitlines() if "held out" in line]
    assert [int(line.split()[1]) for line in held] == [1, 9]


def test_a_line_shows_seconds_an_update_and_the_time_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics_log, "LINE_SECONDS", 0)
    write(tmp_path, after=None, steps=[1, 2], seconds=[60.0, 61.0])
    assert "step      2 of 9  loss 1.0000  kl 1.0000  ce 1.0000  61 s  1 tokens/s  7:00 left" in (
        capsys.readouterr().err
    )


def test_a_line_of_a_sweep_has_the_students_name_and_the_time_left_of_the_whole(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(metrics_log, "LINE_SECONDS", 0)
    place = Place("wide", 2, of=3, updates_after=20)
    write(tmp_path, after=None, steps=[1, 2], seconds=[60.0, 3.0], evaluate=[2], place=place)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["wide (2 of 3)"] * 3
    # 7 and 27 updates of three seconds.
    assert lines[1].endswith("0:21 left  1:21 of the sweep")


def test_tensorboard_shows_the_files_values_also_after_restarts(tmp_path):
    write(tmp_path, after=None, steps=[1, 2, 3, 4, 5], evaluate=[2, 4])
    last = max(tmp_path.glob("events.*"))
    last.write_bytes(last.read_bytes()[:-7])  # killed while it wrote
    write(tmp_path, after=3, steps=[4, 5, 6], loss=2.0, evaluate=[4])
    write(tmp_path, after=6, steps=[])  # there was nothing left to do
    write(tmp_path, after=6, steps=[7], loss=3.0)
    shown = shown_by_tensorboard(tmp_path)
    expected = {}
    for one in read_metrics(tmp_path):
        step = one.pop("step")
        for name, value in one.items():
            tag = name.replace("heldout_", "heldout/") if "heldout" in name else f"train/{name}"
            expected.setdefault(tag, []).append((step, value))
    assert shown == expected
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_that_starts_over_hides_all_older_events(tmp_path):
    write(tmp_path, after=None, steps=[0, 1, 2], evaluate=[1])
    write(tmp_path, after=None, steps=[1], loss=2.0)
    assert shown_by_tensorboard(tmp_path)["train/loss"] == [(1, 2.0)]
    assert "heldout/ce" not in shown_by_tensorboard(tmp_path)


def test_a_kill_loses_no_event(tmp_path):
    metrics = MetricsLog(tmp_path, after=None, steps=9)
    metrics.log_update(line(1, tokens_per_second=1.0, step_seconds=2.0))
    assert shown_by_tensorboard(tmp_path)["train/loss"] == [(1, 1.0)]
    metrics.close()


def test_values_that_are_not_finite_give_no_event(tmp_path):
    write(tmp_path, after=None, steps=[1], loss=float("nan"))
    shown = shown_by_tensorboard(tmp_path)
    assert "train/loss" not in shown
    assert shown["train/kl_loss"] == [(1, 1.0)]


def test_a_link_in_the_place_of_the_metrics_is_not_followed(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        MetricsLog(tmp_path, after=None, steps=9)
    assert not (tmp_path / "elsewhere").exists()
