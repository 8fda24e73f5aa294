"""The commands as functions: from any thread, from plain values, called again and again."""

import json
import subprocess
import sys
import threading

import pytest

import decant
from decant.trainer.run.metrics_log import read_metrics
from tests.making.caches import write_corpus, write_teacher
from tests.paths import ROOT, environment


def in_a_thread(function):
    """The function's result, or the exception that it raised, from a thread of its own."""
    results = []

    def run():
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("library")
    write_corpus(root / "corpus")
    write_teacher(root / "teacher")
    return root


@pytest.fixture(scope="module")
def capture(root):
    """Settings of a capture, in plain Python values."""
    return {
        "corpus": {"files": [f"{root}/corpus/*.txt"], "sequence_length": 64, "heldout": 0.2},
        "teacher": {"model": f"{root}/teacher", "batch_rows": 2},
        "signals": {"logits": {"k": 8, "draws": 4, "profile": "lossless"}},
        "output": f"{root}/cache",
    }


@pytest.fixture(scope="module")
def cache(capture):
    return in_a_thread(lambda: decant.precompute(**capture))


@pytest.fixture(scope="module")
def settings(root, cache):
    """Settings of a run of six updates."""
    return {
        "cache": str(cache.path),
        "student": {"source": f"{root}/teacher", "layers": 1},
        "data": {"steps": 6},
        "evaluate_every": 3,
        "checkpoint_every": 2,
        "heldout_rows": 2,
    }


@pytest.fixture(scope="module")
def lines():
    """What the callback of `run` was called with."""
    return []


@pytest.fixture(scope="module")
def run(root, settings, lines):
    return in_a_thread(
        lambda: decant.train(**settings, run=f"{root}/run", callbacks=[lines.append])
    )


def test_a_capture_returns_its_sealed_cache_and_finds_it_the_next_time(cache, capture):
    assert cache.manifest.logits.k == 8
    assert len(cache.rows(split="heldout"))
    again = decant.precompute(**capture)
    assert again.manifest == cache.manifest


def test_a_run_returns_its_metrics_its_checkpoint_and_its_judgement(run, root):
    assert run.finished
    assert run.checkpoint == root / "run" / "checkpoints" / "6"
    assert run.checkpoint.is_dir()
    assert run.metrics["step"] == run.heldout["step"] == 6
    assert run.metrics["loss"] > 0
    assert run.heldout["heldout_ce"] > 0


def test_a_callback_gets_every_line_of_the_log(run, lines):
    assert lines == read_metrics(run.run)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "heldout_ce" in line] == [0, 3, 6]


def test_an_exception_in_a_callback_ends_the_run_which_then_goes_on(run, root, settings):
    class Enough(Exception):
        pass

    def enough(metrics):
        if metrics["step"] == 5:
            raise Enough

    with pytest.raises(Enough):
        decant.train(**settings, run=root / "broken", callbacks=[enough])
    assert [path.name for path in (root / "broken" / "checkpoints").iterdir()] == ["4"]
    whole = decant.train(**settings, run=root / "broken")
    assert whole.finished
    assert whole.heldout == run.heldout
    assert whole.metrics["loss"] == run.metrics["loss"]


def test_a_config_file_and_changes_of_it(root, settings, run, tmp_path):
    file = tmp_path / "student.toml"
    file.write_text(
        f'cache = "{settings["cache"]}"\nheldout_rows = 2\ncheckpoint_every = 2\n'
        f'evaluate_every = 3\n[student]\nsource = "{root}/teacher"\nlayers = 1\n'
    )
    changed = decant.train(str(file), run=tmp_path / "run", data={"steps": 6})
    assert changed.heldout == run.heldout


def test_a_run_is_judged_from_python(run):
    judged = decant.evaluate_run(run=str(run.run), heldout_rows=2)
    assert judged["heldout_ce"] == pytest.approx(run.heldout["heldout_ce"], rel=1e-5)
    assert json.loads((run.run / "evaluation.json").read_text())["step"] == 6


PLAIN = """
import decant
from decant.trainer.config import HiddenLoss, Optimiser, Student
from pathlib import Path
plain = decant.TrainConfig(
    cache="a",
    loss={
        "tail": "bucket",
        "hidden": [{"weight": 2.0, "teacher_layers": [1], "student_layers": 1}],
    },
    optimiser=Optimiser(freeze="head"),
    student=Student(config="x.json", layers=[0]),
)
assert plain.loss.hidden == (HiddenLoss(weight=2.0, student_layers=(1,), teacher_layers=(1,)),)
assert plain.optimiser.freeze == ("head",) and plain.student.layers == (0,)
assert (plain.cache, plain.student.config) == (Path("a"), Path("x.json"))
hash(plain)
chats = decant.PrecomputeConfig(corpus={"files": "a.txt", "chat_variables": {"x": True}}).corpus
assert (chats.files, chats.chat_variables) == (("a.txt",), ("x=true",))
for wrong, message in [
    ({"loss": {"tail": "bukcet"}}, "loss.tail is 'bukcet'; expected 'bucket' or 'counts' or "),
    ({"loss": 0.5}, "loss is 0.5; expected Loss"),
    ({"run": 3}, "run is 3; expected Path"),
    ({"quiet": 1}, "quiet is 1; expected bool"),
    ({"data": {"steps": "many"}}, "data.steps is 'many'; expected a whole number"),
]:
    try:
        decant.train(**wrong)
    except ValueError as error:
        assert str(error).startswith(message), error
    else:
        raise AssertionError(wrong)
"""


def test_plain_values_mean_what_a_file_says():
    # In a process of its own, because in this one every argument's type is checked first.
    command = [sys.executable, "-c", PLAIN]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dat": {}}, "Train has no setting 'dat'; did you mean data?"),
        ({"data": {"step": 3}}, "Data has no setting 'step'; did you mean steps?"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        decant.train(**settings)


def test_a_directory_in_place_of_a_file_does_not_end_the_process(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such config file"):
        decant.train(tmp_path)


def test_another_commands_settings_are_refused():
    with pytest.raises(ValueError, match=r"expected Train settings, .*; got Precompute"):
        decant.train(decant.PrecomputeConfig())
