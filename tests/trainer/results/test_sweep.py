"""Sweeps: how settings combine, a sweep that is stopped and continued, and one with a failure."""

import json
import math

import pytest

from decant.trainer.__main__ import main
from decant.trainer.data.batches import Batches
from decant.trainer.results.sweep import read_sweep
from decant.trainer.run.metrics_log import read_metrics

BASE = """
[base]
heldout_rows = 2
checkpoint_every = 3
[base.student]
init = "scratch"
layers = 1
[base.data]
steps = 6
[base.loss]
tail = "bucket"
chunk_tokens = 64
"""


def write(tmp_path, text, **values):
    path = tmp_path / "sweep.toml"
    path.write_text(text.format(**values))
    return path


def test_stronger_settings_win_and_a_grid_is_every_combination(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.toml").write_text('cache = "c"\n[loss]\nalpha = 0.1\ntemperature = 3.0\n')
    path = write(
        tmp_path,
        """
run = "runs/s"
[base.loss]
temperature = 2.0
[grid]
"optimiser.learning_rate" = [1e-3, 3e-3]
[[students]]
name = "a"
[[students]]
name = "b"
[students.loss]
alpha = 0.5
""",
    )
    read = read_sweep(path, tmp_path / "train.toml", ["--data.seed=7"])
    assert list(read.students) == [f"{n}-learning_rate={r}" for n in "ab" for r in (1e-3, 3e-3)]
    last = read.students["b-learning_rate=0.003"]
    assert (last.loss.alpha, last.loss.temperature, last.data.seed) == (0.5, 2.0, 7)
    assert (last.optimiser.learning_rate, str(last.cache)) == (3e-3, "c")
    assert last.run == read.run / "b-learning_rate=0.003"
    assert read.students["a-learning_rate=0.001"].loss.alpha == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("studens = []", "unknown key studens; did you mean students"),
        ('[[students]]\nname = "a"\n[[students]]\nname = "a"', "two students are called 'a'"),
        ('[[students]]\nname = "a/b"', "the name must not be a path"),
        ('[[students]]\nname = ".a"', "the name must not be a path"),
        ('[[students]]\nrun = "x"', "a student has no `run`"),
        ("[grid.loss]\nalpha = 0.5", "expected a list of values"),
        ("[grid.loss]\nalpha = []", "expected a list of values"),
        ("[[students]]\n[students.loss]\nalpa = 1.0", "did you mean loss.alpha"),
        ('[[students]]\n[[students]]\ncache = "other"', "held-out rows of one cache"),
        ('heldout_rows = "8"', 'heldout_rows is "8", a string; expected an integer'),
        ("run = 3", "run is 3; expected a string"),
        ("[students]", "students is {}; expected a list, each a table"),
        ("[[students]]\nname = 3", r"students\[0\].name is 3; expected a string"),
        ('[grid]\n"data.seed" = ["1"]', 'data.seed is "1", a string; expected an integer'),
    ],
)
def test_a_malformed_sweep_is_refused(tmp_path, text, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_sweep(write(tmp_path, text))


def test_a_sweep_stopped_and_continued_ends_in_one_comparison(cache, tmp_path, monkeypatch, capsys):
    path = write(
        tmp_path,
        """
run = "{run}"
heldout_rows = 3
[[students]]
name = "taught"
[[students]]
name = "labels"
[students.loss]
alpha = 0.0
"""
        + BASE,
        run=tmp_path / "sweep",
    )
    arguments = ["train", f"--cache={cache.path}", "--sweep", str(path)]
    taken, batch = [], Batches.next

    def next_batch(self):
        taken.append(1)
        if len(taken) == 11:  # in the second student, after its first checkpoint
            raise KeyboardInterrupt
        return batch(self)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "next", next_batch)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    first = (tmp_path / "sweep" / "taught" / "metrics.jsonl").read_bytes()
    assert not (tmp_path / "sweep" / "comparison.json").exists()
    assert main(arguments) == 0
    assert (tmp_path / "sweep" / "taught" / "metrics.jsonl").read_bytes() == first
    comparison = json.loads((tmp_path / "sweep" / "comparison.json").read_text())
    assert {s["name"]: s["settings"] for s in comparison["students"]} == {
        "taught": {"loss.alpha": 0.9},
        "labels": {"loss.alpha": 0.0},
    }
    assert {s["step"] for s in comparison["students"]} == {6}
    assert len({s["heldout_tokens"] for s in comparison["students"]}) == 1
    assert comparison["failed"] == {}
    first, second = comparison["students"]
    assert first["heldout_kl_by"] == second["heldout_kl_by"] == "prior"
    assert first["heldout_kl"] <= second["heldout_kl"]
    difference, error = second["behind"]
    assert difference == pytest.approx(second["heldout_kl"] - first["heldout_kl"], rel=1e-4)
    assert error > 0
    printed = capsys.readouterr().out
    assert all(
        word in printed for word in ("taught", "labels", "loss.alpha", "KL (prior)", "the teacher")
    )


def test_a_student_that_fails_does_not_stop_the_others(cache, tmp_path, capsys):
    path = write(
        tmp_path,
        """
run = "{run}"
[[students]]
name = "bad"
max_bad_steps = 2
[students.optimiser]
learning_rate = 1e6
weight_decay = 1e6
warmup_steps = 1
[[students]]
name = "good"
"""
        + BASE,
        run=tmp_path / "sweep",
    )
    assert main(["train", f"--cache={cache.path}", "--sweep", str(path)]) == 1
    comparison = json.loads((tmp_path / "sweep" / "comparison.json").read_text())
    assert [s["name"] for s in comparison["students"]] == ["good"]
    assert math.isfinite(comparison["students"][0]["heldout_kl_bound"])
    assert "non-finite loss or gradient" in comparison["failed"]["bad"]
    assert read_metrics(tmp_path / "sweep" / "good")[-1]["step"] == 6
    assert "bad failed" in capsys.readouterr().out


def test_a_failing_rerun_keeps_what_the_earlier_sweep_found(cache, tmp_path, capsys):
    text = 'run = "{run}"\n[[students]]\nname = "a"\n[[students]]\nname = "b"\n' + BASE
    path = write(tmp_path, text, run=tmp_path / "sweep")
    arguments = ["train", f"--cache={cache.path}", "--sweep", str(path)]
    comparison = tmp_path / "sweep" / "comparison.json"
    assert main(arguments) == 0
    first = json.loads(comparison.read_text())["students"]
    # No run may change its seed, so every student fails.
    assert main([*arguments, "--data.seed=7"]) == 1
    again = json.loads(comparison.read_text())
    expected = [{**student, "earlier": True, "behind": None} for student in first]
    assert again["students"] == expected
    assert again["failed"].keys() == {"a", "b"}
    assert "(earlier)" in capsys.readouterr().out
    comparison.write_text(comparison.read_text()[:100])
    assert main(arguments) == 1
    assert "comparison.json: damaged" in capsys.readouterr().err


def test_a_student_that_does_not_fit_the_cache_is_refused_before_any_begins(
    cache, tmp_path, capsys
):
    text = '[[students]]\n[[students]]\nname = "drawn"\n[students.loss]\ntail = "sampled"\n'
    path = write(tmp_path, 'run = "{run}"\n' + text + BASE, run=tmp_path / "sweep")
    assert main(["train", f"--cache={cache.path}", "--sweep", str(path)]) == 1
    assert "student drawn: " in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
