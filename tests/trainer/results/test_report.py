"""A report shows what the files of its runs say, in one file."""

import html
import json
import re
import shutil

import numpy as np
import pytest

from decant.schemas.disk.atomic import read_json, write_json
from decant.trainer.__main__ import main
from decant.trainer.config import Evaluate, Report
from decant.trainer.results.charts import charts
from decant.trainer.results.evaluate import evaluate
from decant.trainer.results.report import report
from decant.trainer.results.run_summary import differences, read_run_summaries
from decant.trainer.run.metrics_log import read_metrics


@pytest.fixture(scope="module")
def runs(noisy_run, drawn_cache, tmp_path_factory):
    """An evaluated run, and a made-up one with another α and without what release 0.5 added."""
    directory = tmp_path_factory.mktemp("runs")
    first = shutil.copytree(noisy_run.run, directory / "first")
    evaluate(Evaluate(run=first, cache=drawn_cache.path, batch_rows=3))
    old = shutil.copytree(noisy_run.run, directory / "<old> & slow")
    (old / "data.json").unlink()
    write_json(old / "run.json", {**read_json(old / "run.json"), "loss.alpha": 0.25})
    new = ("step_seconds", "mfu")
    lines = [{k: v for k, v in x.items() if k not in new} for x in read_metrics(old)]
    lines[-1]["heldout_kl_bound"] = 99.5
    lines[1]["loss"] = None  # an update that was not finite
    (old / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return first, old


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    return report(Report(runs=runs, output=tmp_path_factory.mktemp("made") / "report"))


@pytest.mark.parametrize("missing", ["loss.alpha", "loss.temperature", "loss.tail"])
def test_a_foreign_run_without_a_setting_is_an_error_that_names_it(missing, runs, tmp_path, capsys):
    foreign = shutil.copytree(runs[0], tmp_path / "foreign")
    settings = read_json(foreign / "run.json")
    write_json(foreign / "run.json", {n: v for n, v in settings.items() if n != missing})
    assert main(["report", str(foreign), "--output", str(tmp_path / "report")]) == 1
    assert f"run.json: without '{missing}'" in capsys.readouterr().err


def test_a_line_of_metrics_without_a_step_is_an_error(runs, tmp_path, capsys):
    foreign = shutil.copytree(runs[0], tmp_path / "foreign")
    (foreign / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    assert main(["report", str(foreign), "--output", str(tmp_path / "report")]) == 1
    assert "metrics.jsonl: damaged: a line without a step" in capsys.readouterr().err


def cells(page, table=0):
    """Rows of a table as texts."""
    body = re.findall(r"<tbody>(.*?)</tbody>", page, re.S)[table]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.S)
    strip = re.compile(r"<[^>]+>")
    each = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]
    return [[html.unescape(strip.sub("", cell)) for cell in row] for row in each]


def test_the_page_needs_no_other_file(made):
    page = made.read_text("utf-8")
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert not re.search(r"<(script|link|iframe)|@import|url\(", page)
    sources = re.findall(r'src="([^"]{0,26})', page)
    assert len(sources) == 9
    assert set(sources) == {"data:image/svg+xml;base64,"}
    assert 'name="viewport"' in page


def test_its_charts_are_written_as_png_too(made):
    names = {path.name for path in made.parent.glob("*.png")}
    assert {"learned.png", "heldout_kl_bound.png", "calibration.png"} <= names
    assert len(names) == 10
    for path in made.parent.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_first_table_shows_what_the_files_say(made, runs):
    page = made.read_text("utf-8")
    shown = {name: (first, old) for name, first, old in cells(page)}
    last = [line for line in read_metrics(runs[0]) if "heldout_ce" in line][-1]
    assert shown["loss"] == ("α = 0.9, T = 3, bucket", "α = 0.25, T = 3, bucket")
    assert shown["KL ≥ nats a token, T = 1"] == (f"{last['heldout_kl_bound']:.4f}", "99.5000")
    (run, _) = read_run_summaries(runs)
    size = sum(run.caches[0]["bytes_per_token"].values())
    assert shown["read bytes a token"] == (f"{size:,.1f}", "–")
    assert shown["updates"] == ("2", "2")
    low, high = run.measure("heldout_acceptance")
    assert shown["accepted as a draft"] == (f"{low:.1%} – {high:.1%}", "–")
    assert "MFU" not in shown  # the peak of a CPU is not known
    # The lower KL is marked.
    assert page.count(f'"best">{last["heldout_kl_bound"]:.4f}<') == 1
    assert '"best">99.5000<' not in page
    assert "&lt;old&gt; &amp; slow" in page
    assert "<old>" not in page


def test_more_than_four_runs_are_lines_of_the_table(runs, tmp_path):
    many = [shutil.copytree(runs[0], tmp_path / f"run-{i}") for i in range(5)]
    page = report(Report(runs=tuple(many), output=tmp_path / "out")).read_text("utf-8")
    assert [row[0] for row in cells(page)] == [f"run-{i}α = 0.9, T = 3, bucket" for i in range(5)]


def test_settings_that_differ_are_shown_side_by_side(made, runs):
    assert differences(read_run_summaries(runs)) == {"loss.alpha": [0.9, 0.25]}
    assert cells(made.read_text("utf-8"), table=1) == [["loss.alpha", "0.9", "0.25"]]


def test_time_is_what_updates_took(runs):
    first, old = read_run_summaries(runs)
    lines = first.updates
    assert first.seconds[2] == pytest.approx(sum(line["step_seconds"] for line in lines))
    times = [1e6 * line["step_seconds"] / line["tokens"] for line in lines]
    assert first.microseconds_per_token == pytest.approx(np.median(times))
    assert (old.seconds, old.microseconds_per_token, old.bytes_per_token) == ({}, None, None)


def test_with_fewer_lines_than_updates_time_is_the_same(runs, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "run")
    lines = [{"step": step, "loss": 1.0, "tokens": 10, "step_seconds": 2.0} for step in (5, 10)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run_summaries([run])[0].seconds == {0: 0.0, 5: 10.0, 10: 20.0}


def test_the_same_runs_give_the_same_page(made, runs, tmp_path):
    again = report(Report(runs=runs, output=tmp_path / "again"))
    assert again.read_bytes() == made.read_bytes()


def test_an_evaluation_of_an_older_checkpoint_is_not_shown(runs, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "run")
    write_json(run / "evaluation.json", {**read_json(run / "evaluation.json"), "step": 1})
    (summary,) = read_run_summaries([run])
    assert summary.measure("heldout_acceptance") is None
    assert summary.measure("heldout_ce") == summary.heldout[-1]["heldout_ce"]


def test_runs_judged_against_different_teachers_are_marked_and_not_ranked(runs, tmp_path):
    other = shutil.copytree(runs[0], tmp_path / "other")
    evaluation = read_json(other / "evaluation.json")
    stranger = {"other_teacher": True, "teacher_id": "e" * 64, "heldout_kl_bound": 0.0}
    write_json(other / "evaluation.json", {**evaluation, **stranger})
    page = report(Report(runs=(runs[0], other), output=tmp_path / "out")).read_text("utf-8")
    _, *judged = next(row for row in cells(page) if row[0] == "judged on")
    assert "ANOTHER TEACHER" not in judged[0]
    assert f"ANOTHER TEACHER than the student's: {'e' * 12}" in judged[1]
    assert "judged against different teachers" in page
    assert 'class="best"' not in page


def test_runs_with_the_same_name_get_longer_names(runs, tmp_path):
    (tmp_path / "a").mkdir()
    other = shutil.copytree(runs[0], tmp_path / "a" / "first")
    parent = runs[0].parent.name
    assert [run.name for run in read_run_summaries([runs[0], other])] == [
        f"{parent}/first",
        "a/first",
    ]


def test_without_evaluations_or_times_their_charts_are_left_out(runs):
    names = charts(read_run_summaries(runs[1:]))
    assert "kl_over_time" not in names
    assert "calibration" not in names


def test_settings_are_escaped_and_hashes_shortened(runs, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "run")
    bound = read_json(run / "run.json")
    write_json(run / "run.json", {**bound, "student.source": "<b>"})
    assert main(["report", str(run), "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text("utf-8")
    settings = dict(cells(page, table=2))
    assert settings["student.source"] == "<b>"
    assert "<b>" not in page
    assert settings["rows_id"] == bound["rows_id"][:12]
    assert 'class="best"' not in page  # one run is no better than others


def test_the_command_takes_runs(runs, tmp_path, capsys):
    assert main(["report", str(runs[0]), "--output", str(tmp_path / "out")]) == 0
    page = tmp_path / "out" / "report.html"
    assert capsys.readouterr().out == f"wrote {page}: open it in a browser\n"
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "is not the directory of a run" in capsys.readouterr().err
