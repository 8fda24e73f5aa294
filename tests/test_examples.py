"""Every file in examples/ is a config with a note at its top; the cheap ones are really run."""

import re
import tomllib

import pytest

from decant.command_line.settings import parse
from decant.pipelines.config import Precompute
from decant.trainer.config import Train
from decant.trainer.results.sweep import read_sweep
from tests.paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

examples = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


@examples
def test_an_example_is_understood(example):
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
