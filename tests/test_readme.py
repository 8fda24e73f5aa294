"""Every config that the README shows is one: nothing in it is misspelt or gone."""

import re

import pytest

from decant.command_line.settings import parse
from decant.pipelines.config import Precompute
from decant.trainer.config import Train
from decant.trainer.results.sweep import read_sweep
from tests.paths import ROOT

README = ROOT / "README.md"
BLOCKS = re.findall(r"^```toml\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0] for block in BLOCKS])
def test_a_config_in_the_readme_is_understood(block, tmp_path):
    """The comment in its first line says whose it is."""
    path = tmp_path / "config.toml"
    path.write_text(block, encoding="utf-8")
    if block.startswith("# sweep"):
        assert len(read_sweep(path).students) == 4
        return
    kind = Precompute if block.startswith("# precompute") else Train
    assert parse(kind, [str(path)], program="p") != kind()
