"""A teacher from the hub: the plan has its commit, and a resumed capture obeys the plan."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.making.caches import tiny_settings, write_teacher
from tests.making.hub_server import Hub
from tests.models.checkpoints.test_hub import environment


def precompute(root: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    command = [
        *(sys.executable, "-m", "decant.pipelines", "precompute", "--teacher.model=owner/model"),
        *(f"--corpus.files={root}/corpus/*.txt", "--corpus.sequence-length=64"),
        f"--output={root}/cache",
    ]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)


@pytest.fixture
def root(tmp_path):
    tiny_settings(tmp_path)
    (tmp_path / "teacher").rename(tmp_path / "first")
    return tmp_path


def test_a_resumed_capture_keeps_the_commit_of_its_plan(root):
    hub = Hub()
    commit = hub.push_directory("owner/model", root / "first")
    with hub.serving() as address:
        env = environment(root / "home", address) | {"XDG_CACHE_HOME": str(root / "digests")}
        first = precompute(root, env)
        assert first.returncode == 0, first.stderr
        part = root / "cache" / "parts" / "0000"
        plan = json.loads((part / "plan.json").read_text())
        assert plan["teacher"]["model"] == f"owner/model@{commit}"
        hub.push_directory("owner/model", write_teacher(root / "second", seed=1))
        manifest = (root / "cache" / "manifest.json").read_bytes()
        # As if the capture had been killed before its last unit.
        (root / "cache" / "manifest.json").unlink()
        max((part / "commits").iterdir()).unlink()
        again = precompute(root, env)
    assert again.returncode == 0, again.stderr
    assert (root / "cache" / "manifest.json").read_bytes() == manifest


def verify(root: Path, env: dict[str, str], *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "decant.pipelines", "verify", "cache", "--rows=1", *flags]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)


@pytest.mark.slow  # tests/models/checkpoints/test_hub.py has a shorter one
def test_a_cache_does_not_decide_what_verify_fetches(root):
    hub = Hub()
    commit = hub.push_directory("owner/model", root / "first")
    with hub.serving() as address:
        env = environment(root / "home", address) | {"XDG_CACHE_HOME": str(root / "digests")}
        assert precompute(root, env).returncode == 0
        assert verify(root, env).returncode == 0  # fetched before
        shutil.rmtree(root / "home")
        hub.fetched.clear()
        refused = verify(root, env)
        assert refused.returncode == 2, refused
        message = " ".join((refused.stdout + refused.stderr).split())
        assert f"owner/model at {commit}: not fetched before." in message
        assert "say --fetch" in message
        assert hub.fetched == []
        # The person may say where it is, or that it may be fetched.
        assert verify(root, env, f"--teacher={root}/first").returncode == 0
        assert hub.fetched == []
        assert verify(root, env, "--fetch").returncode == 0
        assert "model.safetensors" in hub.fetched
