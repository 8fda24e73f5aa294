"""A cache in the place of a run, and the reverse, is an error that names the command that fits."""

import re

import pytest

from decant.__main__ import main
from decant.command_line.kinds import MARKS, kind_of
from decant.schemas.disk.layout import MANIFEST
from decant.trainer.results.sweep import COMPARISON
from decant.trainer.run.binding import BINDING


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A cache, a run and a sweep, as far as their kind can be told."""
    for kind, mark in MARKS.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / mark).write_text("{}")
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_files_that_mark_a_kind_are_those_that_are_written(places):
    assert {"run": BINDING, "cache": MANIFEST, "sweep": COMPARISON} == MARKS
    assert [kind_of(places / name) for name in ("run", "cache", "sweep", "new", "none")] == [
        "run",
        "cache",
        "sweep",
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("evaluate cache", "run: cache is a cache, not a run: `decant inspect cache` shows"),
        ("evaluate sweep", "run: sweep is a sweep, not a run: `decant report sweep` compares"),
        ("generate cache", "run: cache is a cache, not a run"),
        ("export cache out", "run: cache is a cache, not a run"),
        ("report cache", "runs: cache is a cache, not a run"),
        ("evaluate new --cache run", "cache: run is a run, not a cache: `decant report run` shows"),
        ("train --cache run", "cache: run is a run, not a cache"),
        ("train --cache sweep", "cache: sweep is a sweep, not a cache"),
        ("train --run cache", "run: cache is a cache, not a run"),
        ("train --data.caches.0.path run", "path: run is a run, not a cache"),
        ("inspect run", "cache: run is a run, not a cache"),
        ("gc run", "cache: run is a run, not a cache"),
        ("forget run --source a", "cache: run is a run, not a cache"),
        ("remove run hidden/1", "cache: run is a run, not a cache"),
        ("merge new cache run", "caches: run is a run, not a cache"),
        ("precompute --output run", "output: run is a run, not a cache"),
        ("tokenise --like run", "like: run is a run, not a cache"),
    ],
)
def test_another_kind_is_an_error_that_names_the_command(line, error, capsys):
    assert main(line.split()) == 1
    assert f"error: {error}" in capsys.readouterr().err


def test_verify_then_says_that_the_check_could_not_be_made(capsys):
    assert main(["verify", "run"]) == 2
    assert "cache: run is a run, not a cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("train cache", "cache is a cache, not a config file: .*`decant train --cache cache`"),
        ("precompute run", "run is a run, not a config file: .*`decant evaluate run`"),
        ("precompute new", "new is a directory, not a config file"),
    ],
)
def test_a_directory_is_no_config_file(line, error, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2
    assert re.search(error, capsys.readouterr().err)
