"""metrics.jsonl never repeats or contradicts a step, whatever happened to the run."""

import json

import pytest

from trainer.metrics import Metrics, read_metrics


def line(step, **more):
    return {"step": step, "loss": 1.0, "kl_loss": 1.0, "ce_loss": 1.0, **more}


def write(run, *, after, steps, loss):
    metrics = Metrics(run, after=after, steps=9)
    for step in steps:
        metrics.log(line(step, loss=loss, tokens_per_second=1.0))
    metrics.close()


def test_going_on_from_a_checkpoint_drops_what_came_after_it(tmp_path):
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


def test_what_is_not_finite_is_null_because_json_has_no_name_for_it(tmp_path):
    write(tmp_path, after=None, steps=[1], loss=float("nan"))
    assert '"loss": null' in (tmp_path / "metrics.jsonl").read_text()


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not the directory of a run"):
        read_metrics(tmp_path / "elsewhere")
