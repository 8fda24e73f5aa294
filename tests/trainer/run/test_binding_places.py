"""A run is bound to the place of its student's source, not to how the place is written."""

import shutil
from pathlib import Path

import pytest

from decant.schemas.disk.atomic import read_json, write_json
from decant.trainer.config import AttentionLoss, HiddenLoss, Loss, Student, Train
from decant.trainer.run.binding import bind


def bound(cache, source, run="runs/a", **student):
    config = Train(cache=cache.path, run=Path(run), student=Student(source=source, **student))
    return bind(config, cache=cache, steps=2).values


@pytest.fixture
def project(tmp_path, monkeypatch):
    for folder in ("configs", "runs/a", "teacher", "other"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "configs/shape.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_goes_on_from_another_directory(cache, project, monkeypatch):
    began = bound(cache, "teacher", config=Path("configs/shape.json"))
    assert began["student.source"] == "../../teacher"
    monkeypatch.chdir(project / "configs")
    again = bound(cache, "../teacher", "../runs/a", config=Path("shape.json"))
    assert again == began
    with pytest.raises(ValueError, match=r"student\.source: this run has '.*teacher', asked"):
        bound(cache, "../other", "../runs/a", config=Path("shape.json"))


def test_a_run_of_an_older_release_goes_on_where_it_was_started(cache, project):
    bound(cache, "teacher")
    file = project / "runs/a/run.json"
    for written in ("teacher", str(project / "teacher")):
        write_json(file, {**read_json(file), "student.source": written})
        bound(cache, "teacher")


def test_run_and_source_may_move_together_and_the_source_may_be_gone(cache, project, monkeypatch):
    bound(cache, "teacher")
    moved = shutil.copytree(project, project.parent / f"{project.name}-moved")
    monkeypatch.chdir(moved)
    bound(cache, "teacher")
    Path("teacher").rmdir()
    bound(cache, "teacher")


@pytest.mark.parametrize("name", ["embedded", "owner/name"])
def test_a_word_or_a_hub_id_stays_as_it_is(name, cache, project):
    assert bound(cache, name)["student.source"] == name


def test_a_run_of_an_older_release_has_the_defaults_of_its_terms_new_settings(cache, project):
    def with_terms(scale):
        terms = Loss(hidden=(HiddenLoss(),), attention=(AttentionLoss(scale=scale),))
        config = Train(cache=cache.path, run=Path("runs/a"), loss=terms)
        return bind(config, cache=cache, steps=2)

    with_terms("mean")
    file = project / "runs/a/run.json"
    saved = read_json(file)
    older = {n: x for n, x in saved.items() if not n.endswith(".scale")}
    assert len(older) == len(saved) - 2
    write_json(file, older)
    with_terms("mean")
    with pytest.raises(ValueError, match=r"loss\.attention\[0\]\.scale: this run has 'mean'"):
        with_terms("pairs")
