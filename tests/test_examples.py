"""Every file in examples/ is a config with a note at its top; the cheap ones are really run."""

import json
import re
import shutil
import tomllib

import pytest

from decant.command_line.settings import parse
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Precompute
from decant.schemas import open_cache
from decant.trainer.config import Train
from decant.trainer.results.sweep import read_sweep
from decant.trainer.run.train import train
from tests.making.caches import write_corpus, write_teacher
from tests.paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

examples = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


@examples
def test_an_example_is_understood(example, monkeypatch):
    monkeypatch.chdir(example.parent)  # there nobody asks whether its files are there
    table = tomllib.loads(example.read_text("utf-8"))
    if "students" in table:
        assert len(read_sweep(example).students) == 4
        return
    kind = Precompute if "output" in table else Train
    assert parse(kind, [str(example)], program="p") != kind()


@examples
def test_an_example_begins_with_its_question_its_setup_and_what_to_expect(example):
    note = re.match(r"(#.*\n)+", example.read_text("utf-8"))
    assert note
    assert re.search(r"# Question: .*\n# Setup: (.*\n)+?# What (to expect|came out)", note[0])
    commands = re.findall(r"examples/([\w-]+\.toml)", note[0])
    assert example.name in commands


@examples
def test_an_example_is_named_by_a_page(example):
    assert any(f"../examples/{example.name}" in page.read_text("utf-8") for page in PAGES)


TEACHER = ("--corpus.files", "../data/*.txt", "--corpus.sequence-length", "64")
TEACHER += ("--teacher.model", "../checkpoints/teacher", "--corpus.heldout", "0.3")
STUDENT = ("--student.source", "../checkpoints/teacher", "--student.layers", "2")
STUDENT += ("--data.steps", "2", "--heldout-rows", "2")


@pytest.mark.slow
def test_cheap_examples_run_with_a_tiny_teacher(tmp_path, monkeypatch):
    """The others are made of the same settings, and their commands are run by other tests."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    write_corpus(tmp_path / "data", files=8, words=150)
    write_teacher(tmp_path / "checkpoints" / "teacher")
    monkeypatch.chdir(tmp_path / "examples")

    precompute(parse(Precompute, ["hidden-states.toml", *TEACHER], program="p"))
    before = open_cache("../runs/cache").manifest
    default = {"logits", "counts", "sketch"}
    assert set(before.signals) == default | {"hidden/2"}
    blocks = ("--signals.attention.layers", "0", "1")
    precompute(parse(Precompute, ["attention.toml", *TEACHER, *blocks], program="p"))
    after = open_cache("../runs/cache").manifest
    assert set(after.signals) == default | {"attention/0", "attention/1", "hidden/2"}
    assert after.rows_id == before.rows_id

    for name in ("attention-student.toml", "keep-best.toml", "any-temperature-student.toml"):
        assert train(parse(Train, [name, *STUDENT], program="p"))
    lines = (tmp_path / "runs" / "attention-student" / "metrics.jsonl").read_text().splitlines()
    updates = [line for line in map(json.loads, lines) if "kl_loss" in line]
    assert len(updates) == 2
    assert all({"hidden_state_loss", "attention_loss"} <= line.keys() for line in updates)
