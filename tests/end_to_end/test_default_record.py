"""A cache of default settings through every command that reads it, typed as a user types them."""

import json
from pathlib import Path

import pytest

from decant.__main__ import main
from tests.making.caches import tiny_settings, write_corpus


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Holds a corpus, a teacher and the sealed cache."""
    place = tmp_path_factory.mktemp("default-record")
    write_corpus(place / "corpus", files=6, words=200)
    tiny_settings(place)  # writes the teacher
    corpus = ["--corpus.files", str(place / "corpus"), "--corpus.heldout=0.3"]
    teacher = ["--teacher.model", str(place / "teacher"), "--corpus.sequence-length=64"]
    assert main(["precompute", *corpus, *teacher, "--output", str(place / "cache")]) == 0
    return place


@pytest.mark.parametrize(
    ("temperature", "tail"),
    # Counts at T = 1 are in test_tail_of_a_run.py too.
    [pytest.param(1, "counts", marks=pytest.mark.slow), (4, "sketch")],
)
def test_a_student_learns_from_counts_at_1_and_from_the_sketch_at_4(
    place, capfd, temperature, tail
):
    run = place / f"student-{temperature}"
    student = ["--student.source", str(place / "teacher"), "--student.layers=1", "--data.steps=6"]
    flags = [*student, f"--loss.temperature={temperature}", "--data.batch-rows=2", "--json"]
    assert main(["train", "--cache", str(place / "cache"), "--run", str(run), *flags]) == 0
    told = capfd.readouterr()
    assert json.loads(told.out)["finished"]
    assert f"loss.tail is {tail}, for T = {temperature}; the cache holds the top 8" in told.err
    assert "held out: KL (counts)" in told.err
    assert "little" not in told.err
    assert "the teacher's" in told.err
    assert main(["evaluate", "--run", str(run), "--json"]) == 0
    judged = json.loads(capfd.readouterr().out)
    assert abs(judged["heldout_kl_counts"]) < 0.1, "the student is nearly the teacher"
    report = place / f"report-{temperature}"
    assert main(["report", str(run), "--output", str(report), "--json"]) == 0
    assert "KL (counts)" in (report / "report.html").read_text()


def test_inspect_and_verify_show_all_that_it_holds(place, capsys):
    assert main(["inspect", str(place / "cache")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for what in ("counts", "sketch", "k = 8"):
        assert what in shown
    assert main(["inspect", str(place / "cache"), "--row=0"]) == 0
    assert main(["inspect", str(place / "cache"), "--html", str(place / "pages")]) == 0
    capsys.readouterr()
    assert main(["verify", str(place / "cache"), "--rows=4", "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["status"] == 0
    assert checked["problems"] == []
