"""A report shows what the files of its runs say, in one file."""

import html
import json
import re
import shutil

import numpy as np
import pytest

from decant.foreign import escaped
from decant.schemas.disk.atomic import read_json, write_json
from decant.trainer.__main__ import main
from decant.trainer.config import Evaluate, Report
from decant.trainer.results.charts import as_svg, charts
from decant.trainer.results.evaluate import evaluate
from decant.trainer.results.report import report
from decant.trainer.results.run_summary import differences, read_run_summaries
from decant.trainer.results.seed_groups import group_by_seed
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
    lines[-1] |= {"heldout_kl_unbiased": 99.5, "heldout_kl": 99.5}
    lines[1]["loss"] = None  # an update that was not finite
    (old / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return first, old


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    """With a sample, which the runs keep, so that later reports of them or copies are quick."""
    out = tmp_path_factory.mktemp("made") / "report"
    return report(Report(runs=runs, output=out, samples=1))


def made_of(*runs, output, **settings):
    """The report's page; without samples unless the settings ask for them."""
    config = Report(runs=runs, output=output, **{"samples": 0, **settings})
    return report(config).read_text("utf-8")


def by_name(page, table=0):
    """Cells of a table's rows by the first word of the row."""
    return {row[0]: row[1:] for row in cells(page, table)}


def seeds_of(run, directory, *, seeds, **settings):
    """Copies of a run that say they had these seeds and settings, with slightly other KLs."""
    copies = []
    for seed in seeds:
        name = "-".join([*(f"{k.rpartition('.')[2]}={v}" for k, v in settings.items())])
        copy = shutil.copytree(run, directory / f"{name}-seed={seed}")
        bound = read_json(copy / "run.json")
        write_json(copy / "run.json", {**bound, **settings, "data.seed": seed})
        judged = read_json(copy / "evaluation.json")
        higher = judged["heldout_kl"] + seed + settings.get("loss.temperature", 0)
        changed = {"heldout_kl": higher, "heldout_kl_unbiased": higher}
        write_json(copy / "evaluation.json", {**judged, **changed})
        copies.append(copy)
    return copies


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
    assert {"learned.png", "heldout_kl.png", "calibration.png"} <= names
    assert len(names) == 10
    for path in made.parent.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_short_table_has_the_headline_and_the_teacher(made, runs):
    page = made.read_text("utf-8")
    first, old, teacher = cells(page)
    summary, _ = read_run_summaries(runs)
    error = summary.measure("heldout_kl_error")
    assert first[0] == "firstα = 0.9, T = 3, bucket"
    assert old[0] == "<old> & slowα = 0.25, T = 3, bucket"
    assert first[1] == f"{summary.measure('heldout_kl_unbiased'):.4f}± {error:.4f}"
    assert old[1] == "99.5000"
    assert teacher[0].startswith("the teacher")
    assert teacher[1] == "0"
    # Exact, because the cache stores the log-probability of each next token.
    assert f"{summary.measure('heldout_teacher_ce'):.4f}" in teacher
    assert "KL (draws)" in page.split("<tbody>")[0]
    # The lower KL is marked.
    assert f'"best">{first[1].split("±")[0]}<' in page
    assert '"best">99.5000' not in page
    assert "&lt;old&gt; &amp; slow" in page
    assert "<old>" not in page


def test_the_folded_table_shows_what_the_files_say(made, runs):
    shown = by_name(made.read_text("utf-8"), table=1)
    first, old = read_run_summaries(runs)
    assert shown["loss"] == ["α = 0.9, T = 3, bucket", "α = 0.25, T = 3, bucket"]
    bounds = [f"{run.measure('heldout_kl_bound'):.4f}" for run in (first, old)]
    assert shown["KL (bound) nats a token"] == bounds
    size = sum(first.caches[0]["bytes_per_token"].values())
    assert shown["read bytes a token"] == [f"{size:,.1f}", "–"]
    assert shown["updates"] == ["2", "2"]
    low, high = first.measure("heldout_acceptance")
    assert shown["accepted as a draft"] == [f"{low:.1%} – {high:.1%}", "–"]
    assert "MFU" not in shown  # the peak of a CPU is not known


def test_more_than_four_runs_are_lines_of_the_folded_table(runs, tmp_path):
    many = [shutil.copytree(runs[0], tmp_path / f"run-{i}") for i in range(5)]
    for i, run in enumerate(many):
        write_json(run / "run.json", {**read_json(run / "run.json"), "loss.alpha": i / 8})
    page = made_of(*many, output=tmp_path / "out")
    assert [row[0] for row in cells(page, table=1)] == [f"run-{i}" for i in range(5)]


def test_runs_that_differ_in_the_seed_are_one_line_with_a_band(runs, tmp_path):
    three = seeds_of(runs[0], tmp_path, seeds=(0, 1, 2), **{"loss.temperature": 4.0})
    (group,) = group_by_seed(read_run_summaries(three))
    assert group.name == "temperature=4.0 (3 seeds)"
    page = made_of(*three, output=tmp_path / "out")
    kl = read_json(runs[0] / "evaluation.json")["heldout_kl"] + 4
    line, _teacher = cells(page)
    assert line[1] == f"{kl + 1:.4f}{kl:.4f} – {kl + 2:.4f}"
    band = as_svg(charts([group])["heldout_kl"])
    assert b"FillBetween" in band or b"PolyCollection" in band
    assert b"PolyCollection" not in as_svg(charts(group_by_seed([group.runs[0]]))["heldout_kl"])


def test_a_sweeps_directory_stands_for_its_runs_and_shows_settings_against_the_headline(
    runs, tmp_path
):
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    for temperature in (1.0, 2.0, 16.0):
        seeds_of(runs[0], sweep, seeds=(0, 1), **{"loss.temperature": temperature})
    (sweep / "not-begun").mkdir()
    (sweep / "compiled").mkdir()
    comparison = {"students": [], "failed": {"t=<64>": "ran out of luck"}}
    (sweep / "comparison.json").write_text(json.dumps(comparison))
    page = made_of(sweep, output=tmp_path / "out")
    assert "6 runs compared" in page
    assert "t=&lt;64&gt; failed: ran out of luck" in page
    assert [row[0].split(" (")[0] for row in cells(page)[:3]] == [
        f"temperature={t}" for t in (1.0, 16.0, 2.0)
    ]
    assert (tmp_path / "out" / "setting-loss.temperature.png").exists()
    drawn = charts(group_by_seed(read_run_summaries([sweep])))
    svg = as_svg(drawn["setting loss.temperature"]).decode()
    assert "KL (draws) by loss.temperature" in svg
    assert all(f">{t}<" in svg for t in ("1", "2", "16"))  # ticks at the values
    assert "setting data.seed" not in drawn


def test_charts_share_one_legend_and_show_the_teacher(made, runs):
    page = made.read_text("utf-8")
    assert page.count('<ul class="legend">') == 1
    drawn = charts(group_by_seed(read_run_summaries(runs)))
    for name, draw in drawn.items():
        assert b'id="legend' not in as_svg(draw), name
    assert b"stroke-dasharray" in as_svg(drawn["heldout_ce"])
    assert b"stroke-dasharray" not in as_svg(drawn["heldout_agreement"])


def test_samples_continue_held_out_text_and_are_kept_in_the_run(runs, made, tmp_path):
    page = made.read_text("utf-8")
    kept = read_json(runs[0] / "samples.json")
    (sample,) = kept["samples"]
    assert sample["prompt"]
    assert sample["goes_on"]
    for text in sample.values():
        assert escaped(text) in page
    run = shutil.copytree(runs[0], tmp_path / "run")
    changed = {**kept, "samples": [{**sample, "sample": "<kept> text"}]}
    write_json(run / "samples.json", changed)
    assert "&lt;kept&gt; text" in made_of(run, output=tmp_path / "out", samples=1)
    # Another seed is another sample.
    assert "&lt;kept&gt;" not in made_of(run, output=tmp_path / "out", samples=1, seed=1)
    assert "Samples" not in made_of(run, output=tmp_path / "out")


def test_a_run_that_can_give_no_samples_says_why(runs, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "run")
    (run / "data.json").unlink()
    page = made_of(run, output=tmp_path / "out", samples=1)
    assert "does not record its cache; give --prompts" in page


def test_runs_judged_on_different_rows_are_not_ranked(runs, tmp_path):
    other = shutil.copytree(runs[0], tmp_path / "other")
    fewer = {"heldout_tokens": 12, "heldout_kl": 0.0, "heldout_kl_unbiased": 0.0}
    write_json(other / "evaluation.json", {**read_json(other / "evaluation.json"), **fewer})
    page = made_of(runs[0], other, output=tmp_path / "out")
    assert "judged on different rows" in page
    assert 'class="best"' not in page


def test_settings_that_differ_are_shown_side_by_side(made, runs):
    assert differences(read_run_summaries(runs)) == {"loss.alpha": [0.9, 0.25]}
    assert by_name(made.read_text("utf-8"), table=2) == {"first": ["0.9"], "<old> & slow": ["0.25"]}


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
    again = report(Report(runs=runs, output=tmp_path / "again", samples=1))
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
    page = made_of(runs[0], other, output=tmp_path / "out")
    judged = by_name(page, table=1)["judged on"]
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
    names = charts(group_by_seed(read_run_summaries(runs[1:])))
    assert "kl_over_time" not in names
    assert "calibration" not in names


def test_settings_are_escaped_and_hashes_shortened(runs, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "run")
    bound = read_json(run / "run.json")
    write_json(run / "run.json", {**bound, "student.source": "<b>"})
    flags = ["--output", str(tmp_path / "out"), "--samples", "0"]
    assert main(["report", str(run), *flags]) == 0
    page = (tmp_path / "out/report.html").read_text("utf-8")
    settings = dict(cells(page, table=3))
    assert settings["student.source"] == "<b>"
    assert "<b>" not in page
    assert settings["rows_id"] == bound["rows_id"][:12]
    assert 'class="best"' not in page  # one run is no better than others


def test_the_command_takes_runs(runs, tmp_path, capsys):
    flags = ["--output", str(tmp_path / "out"), "--samples", "0"]
    assert main(["report", str(runs[0]), *flags]) == 0
    page = tmp_path / "out" / "report.html"
    assert capsys.readouterr().out == f"wrote {page}: open it in a browser\n"
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "it is not the directory of a run" in capsys.readouterr().err
