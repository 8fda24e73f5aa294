"""Every config that the documents show is one: nothing in it is misspelt or gone."""

import re

import pytest

from decant.command_line.settings import parse
from decant.pipelines.config import Precompute
from decant.trainer.config import Train
from decant.trainer.results.sweep import read_sweep
from tests.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```toml\n(.*?)^```", re.M | re.S)
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{block.splitlines()[0]}")
    for page in PAGES
    for block in BLOCK.findall(page.read_text("utf-8"))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_config_in_the_documents_is_understood(block, tmp_path):
    """The comment in its first line says whose it is."""
    path = tmp_path / "config.toml"
    path.write_text(block, encoding="utf-8")
    if block.startswith("# sweep"):
        assert len(read_sweep(path).students) == 4
        return
    kind = Precompute if block.startswith("# precompute") else Train
    assert parse(kind, [str(path)], program="p") != kind()


def test_there_are_configs_in_the_documents():
    assert len(BLOCKS) > 10
