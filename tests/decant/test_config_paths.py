"""Paths in a config file are relative to the file, wherever the command is started."""

import os
from pathlib import Path

import pytest

from decant.__main__ import main
from decant.command_line.local_paths import without_tilde
from decant.command_line.settings import parse
from decant.pipelines.config import Precompute
from decant.trainer.config import Evaluate, Report, Train
from decant.trainer.results.sweep import read_sweep
from tests.making.caches import write_corpus


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A project whose configs are in a folder, with the working directory at its top."""
    for folder in ("configs/data", "configs/teacher", "configs/cache", "elsewhere", "old"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "configs/data/a.txt").write_text("a")
    (tmp_path / "configs/template.jinja").write_text("{{ messages }}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(tree, text):
    (tree / "configs/c.toml").write_text(text)
    return "configs/c.toml"


CAPTURE = """
output = "../runs/new"
[corpus]
files = ["data/*.txt", "embedded"]
chat_template = "template.jinja"
[teacher]
model = "teacher"
"""


def test_every_path_of_a_file_is_beside_it_and_words_stay(tree):
    config = parse(Precompute, [write(tree, CAPTURE)], program="p")
    assert config.corpus.files == ("configs/data/*.txt", "embedded")
    assert config.corpus.chat_template == "configs/template.jinja"
    assert config.teacher.model == "configs/teacher"
    assert str(config.output) == "runs/new"


def test_the_same_file_means_the_same_places_from_anywhere(tree, monkeypatch):
    write(tree, CAPTURE)
    places = set()
    for start in (".", "configs", "elsewhere"):
        monkeypatch.chdir(tree / start)
        config = parse(Precompute, [os.path.relpath(tree / "configs/c.toml")], program="p")
        paths = (*config.corpus.files, config.corpus.chat_template, config.teacher.model)
        places.add(tuple(str(Path(path).resolve()) for path in (*paths, config.output)[2:]))
        assert str(config.output) == os.path.relpath(tree / "runs/new")
    assert len(places) == 1


def test_flags_and_defaults_are_relative_to_the_working_directory(tree):
    file = write(tree, 'output = "cache"\n')
    assert str(parse(Precompute, [file], program="p").output) == "configs/cache"
    assert str(parse(Precompute, [file, "--output", "x"], program="p").output) == "x"
    assert str(parse(Precompute, [write(tree, "")], program="p").output) == "runs/cache"


def test_what_is_only_in_the_working_directory_is_taken_from_there_and_said(tree, capsys):
    """As releases before 0.9 did for every path: a capture of weeks must not begin again."""
    config = parse(Precompute, [write(tree, 'output = "old"\n')], program="p")
    assert str(config.output) == "old"
    assert "output is old in the working directory, because there is no configs/old" in (
        told := capsys.readouterr().err
    )
    assert "write ../old" in told


def test_of_two_places_that_are_there_the_one_beside_the_file_is_taken_and_both_are_said(
    tree, capsys
):
    (tree / "cache").mkdir()
    config = parse(Precompute, [write(tree, 'output = "cache"\n')], program="p")
    assert str(config.output) == "configs/cache"
    assert "configs/cache, beside the file; cache here is another" in capsys.readouterr().err


def test_a_path_that_is_nowhere_names_both_places_unless_a_flag_replaces_it(tree, capsys):
    file = write(tree, 'cache = "gone"\n[student]\nsource = "./no-student"\n')
    assert main(["train", file]) == 1
    told = capsys.readouterr().err
    assert (
        "configs/c.toml: cache is not there. Looked for configs/gone, relative to the file" in told
    )
    assert f"gone in the working directory, {tree}" in told
    with pytest.raises(FileNotFoundError, match=r"student\.source is not there"):
        parse(Train, [file, "--cache", "x"], program="p")
    flags = ["--cache", "x", "--student.source", "y"]
    assert str(parse(Train, [file, *flags], program="p").cache) == "x"
    files = write(tree, '[corpus]\nfiles = ["none/*.txt"]\n')
    with pytest.raises(FileNotFoundError, match=r"corpus\.files is not .* configs/none/\*\.txt, "):
        parse(Precompute, [files], program="p")


def test_a_hub_id_stays_and_a_folder_of_its_name_wins(tree):
    file = write(tree, '[teacher]\nmodel = "owner/name"\n')
    assert parse(Precompute, [file], program="p").teacher.model == "owner/name"
    (tree / "configs/owner/name").mkdir(parents=True)
    assert parse(Precompute, [file], program="p").teacher.model == "configs/owner/name"


def test_an_address_stays_and_is_refused_where_it_does_not_work(tree, capsys):
    assert main(["train", write(tree, 'run = "gs://bucket/run"\n')]) == 1
    assert "error: run is gs://bucket/run: " in capsys.readouterr().err


def test_a_tilde_in_a_file_is_the_home_directory(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree / "elsewhere"))
    config = parse(Precompute, [write(tree, 'output = "~/x"\n')], program="p")
    assert config.output == tree / "elsewhere/x"


def test_lists_of_tables_and_lists_of_paths_too(tree):
    file = write(tree, '[[data.caches]]\npath = "cache"\n')
    assert str(parse(Train, [file], program="p").data.caches[0].path) == "configs/cache"
    report = parse(Report, [write(tree, 'runs = ["cache", "teacher"]\n')], program="p")
    assert list(map(str, report.runs)) == ["configs/cache", "configs/teacher"]
    assert str(parse(Evaluate, [write(tree, 'run = "cache"\n')], program="p").run).endswith(
        "s/cache"
    )


def test_each_file_of_a_sweep_has_its_own_folder(tree):
    shared = write(tree, '[student]\nsource = "teacher"\n')
    (tree / "elsewhere/student").mkdir()
    (tree / "elsewhere/s.toml").write_text(
        'run = "sweep"\n[base]\ncache = "../configs/cache"\n'
        '[grid]\n"student.source" = ["student", "owner/name"]\n'
    )
    read = read_sweep(tree / "elsewhere/s.toml", tree / shared)
    assert {one.student.source for one in read.students.values()} == {
        str(tree / "elsewhere/student"),
        "owner/name",
    }
    assert read.run == tree / "elsewhere/sweep"
    assert {one.cache for one in read.students.values()} == {tree / "configs/cache"}
    (tree / "configs/wrong.toml").write_text("[loss]\nalpa = 1\n")
    with pytest.raises(ValueError, match=r"configs/wrong\.toml: unknown key loss\.alpa"):
        read_sweep(tree / "elsewhere/s.toml", tree / "configs/wrong.toml")


def test_names_of_sources_do_not_depend_on_where_the_command_is_started(tree, monkeypatch):
    from decant.pipelines.capture.step_inputs import corpus_sources

    write_corpus(tree / "configs/corpus", files=2)
    write(tree, '[corpus]\nfiles = ["corpus/*.txt", "data/a.txt"]\n')
    names = set()
    for start in (".", "configs", "elsewhere"):
        monkeypatch.chdir(tree / start)
        config = parse(Precompute, [os.path.relpath(tree / "configs/c.toml")], program="p")
        sources, _ = corpus_sources(config.corpus)
        names.add(tuple((source.name, source.path, source.sha256) for source in sources))
    assert len(names) == 1


def test_the_home_of_nobody_is_a_name_like_any_other():
    assert without_tilde("~nobody_of_this_name/x") == "~nobody_of_this_name/x"
    assert without_tilde("~/x") == str(Path.home() / "x")
