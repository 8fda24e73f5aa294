"""A mistreated cache gives the same values or an error: never other values, a hang or a crash."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from decant.pipelines.capture import step_inputs
from decant.pipelines.config import Attention, Hidden
from tests.making.caches import tiny_cache, write_corpus
from tests.paths import ROOT, environment


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mistreated")
    write_corpus(root / "corpus", files=6, words=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_inputs, "choose_unit_rows", lambda *_, **__: 2)
        return tiny_cache(
            root,
            profile="compact",
            draws=3,
            heldout=0.3,
            shard_bytes=1000,
            hidden=Hidden(layers=(1,), dtype="int8", width=6),
            attention=Attention(layers=(1,)),
        ).path


@pytest.mark.parametrize("count", [64, pytest.param(2000, marks=pytest.mark.mistreat)])
def test_flips_cuts_exchanges_and_deletions_are_errors_or_change_nothing(cache, count):
    command = [sys.executable, "-m", "tests.mistreating", str(cache), str(count), "0"]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["faults"] == []
    assert sum(result["outcomes"].values()) == count
    for kind in ("flip", "cut", "exchange", "delete"):
        assert result["outcomes"][f"{kind}: error"] > 0
