"""SIGKILL at every stage of a capture, a full disk, Ctrl-C; then a rerun: the cache of an
undisturbed run."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.__main__ import main
from pipelines.config import Attention, Hidden
from schemas import open_cache
from tests.make_cache import tiny_cache, tiny_settings

# Runs the real command in a real process that kills itself with the real signal just before the
# n-th call of a function: between the bytes of a unit and its commit, for example.
KILLED = """
import importlib, os, signal, sys
module, name, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
target = importlib.import_module(module)
original = getattr(target, name)

def dying(*args, **kwargs):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(target, name, dying)
from pipelines.__main__ import main
sys.exit(main(sys.argv[4:]))
"""

SIGNALS = {
    "profile": "fast",
    "draws": 3,
    "hidden": Hidden(layers=(1,), dtype="int8", width=6),
    "attention": Attention(layers="all"),
}

STAGES = {
    "tokenise, second shard": ("pipelines.tokenise", "write_json", 2),
    "tokenise, before its result": ("pipelines.tokenise", "_gather", 1),
    "calibrate, tables written, plan not": ("pipelines.calibrate", "write_plan", 1),
    "capture, first unit written, commit not": ("pipelines.capture", "write_commit", 1),
    "capture, between a unit's commits": ("pipelines.capture", "write_commit", 5),
    "capture, a file of an array": ("schemas.array_io", "write_bytes", 9),
    "capture, in the middle": ("pipelines.capture", "write_records", 4),
    "between last commit and seal": ("pipelines.seal", "write_manifest", 1),
    "sealed, scratch not removed": ("pipelines.seal", "clean", 1),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def undisturbed(root) -> str:
    return tiny_cache(root, **SIGNALS).manifest.cache_id


def command(root: Path, output: Path) -> list[str]:
    """The flags of `tiny_settings` as a user would type them."""
    config = tiny_settings(root, **SIGNALS, output=output)
    return [
        "precompute",
        *("--corpus.files", *config.corpus.files),
        f"--corpus.sequence-length={config.corpus.sequence_length}",
        f"--corpus.heldout={config.corpus.heldout}",
        f"--corpus.shard-bytes={config.corpus.shard_bytes}",
        f"--teacher.model={config.teacher.model}",
        f"--teacher.batch-rows={config.teacher.batch_rows}",
        f"--signals.logits.k={config.signals.logits.k}",
        f"--signals.logits.draws={config.signals.logits.draws}",
        f"--signals.logits.profile={config.signals.logits.profile}",
        *("--signals.hidden.layers", *map(str, config.signals.hidden.layers)),
        f"--signals.hidden.dtype={config.signals.hidden.dtype}",
        f"--signals.hidden.width={config.signals.hidden.width}",
        f"--signals.attention.layers={config.signals.attention.layers}",
        f"--output={config.output}",
    ]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.getcwd()}  # noqa: PTH109
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("stage", STAGES)
def test_killed_anywhere_and_rerun_the_cache_has_the_same_bytes(root, undisturbed, stage):
    output = root / stage.replace(" ", "-")
    module, function, calls = STAGES[stage]
    flags = command(root, output)
    killed = run("-c", KILLED, module, function, str(calls), *flags)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if stage != "sealed, scratch not removed":
        with pytest.raises(ValueError, match="not sealed"):
            open_cache(output)
    rerun = run("-m", "pipelines", *flags)
    assert rerun.returncode == 0, rerun.stderr
    assert open_cache(output).manifest.cache_id == undisturbed
    left = [path.name for path in output.rglob("*") if path.name.endswith(".tmp")]
    assert left == []
    assert not (output / "parts" / "0000" / "work").exists()


ADDING = {
    "calibrated, plan not written": ("pipelines.calibrate", "write_plan", 1),
    "in the middle": ("pipelines.capture", "write_commit", 5),
    "a file of an array": ("schemas.array_io", "write_bytes", 9),
    "before the manifest": ("pipelines.seal", "write_manifest", 1),
    "sealed, its plan not removed": ("pipelines.add", "clean", 1),
}


@pytest.fixture(scope="module")
def logits_only(root) -> Path:
    return tiny_cache(root, profile="fast", draws=3, output=root / "logits-only").path


@pytest.mark.parametrize("stage", ADDING)
def test_killed_while_adding_the_old_cache_stands_and_a_rerun_adds(
    root, logits_only, tmp_path, stage
):
    cache = Path(shutil.copytree(logits_only, tmp_path / "cache"))
    module, function, calls = ADDING[stage]
    killed = run("-c", KILLED, module, function, str(calls), *command(root, cache))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if stage != "sealed, its plan not removed":
        assert open_cache(cache).manifest == open_cache(logits_only).manifest
    rerun = run("-m", "pipelines", *command(root, cache))
    assert rerun.returncode == 0, rerun.stderr
    added = open_cache(cache)
    assert added.manifest.cache_id == _added_undisturbed(root, logits_only)
    added.read(added.rows(), signals=tuple(added.manifest.signals))
    left = [p.name for p in cache.rglob("*") if p.name.endswith(".tmp") or "adding" in p.name]
    assert left == []


def _added_undisturbed(root: Path, logits_only: Path) -> str:
    cache = root / "added"
    if not cache.exists():
        shutil.copytree(logits_only, cache)
        tiny_cache(root, **SIGNALS, output=cache)
    return open_cache(cache).manifest.cache_id


def test_a_full_disk_is_said_and_what_is_committed_stays(root, undisturbed, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    # Room for the rows and a few units: an ArrayRecord file takes at least 128 KB.
    options = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(mount)]
    if subprocess.run(options, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        flags = command(root, mount / "cache")
        full = run("-m", "pipelines", *flags)
        assert full.returncode == 1
        assert "No space left on device" in full.stderr
        assert "run again" in full.stderr
        assert not list(mount.rglob("manifest.json"))
        subprocess.run(["mount", "-o", "remount,size=50m", str(mount)], check=True)
        rerun = run("-m", "pipelines", *flags)
        assert rerun.returncode == 0, rerun.stderr
        assert open_cache(mount / "cache").manifest.cache_id == undisturbed
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_hand_or_scheduler_it_says_what_is_done_and_goes_on(
    root, undisturbed, sent, status
):
    output = root / sent.name
    flags = command(root, output)
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines", *flags],
        env=os.environ | {"PYTHONPATH": os.getcwd()},  # noqa: PTH109
        stderr=subprocess.PIPE,
        text=True,
    )
    while not units_done(output):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(sent)
    sent_at = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert time.monotonic() - sent_at < 10
    done, units = units_done(output), len(list(output.glob("parts/0000/rows/*")))
    assert 1 <= done < units
    assert said.strip() == (
        f"stopped: {done} of {units} units are done; run the same command again and it goes on "
        "from here"
    )
    assert main(flags) == 0
    assert open_cache(output).manifest.cache_id == undisturbed


def units_done(cache: Path) -> int:
    """How many units have every signal's commit."""
    commits = [path.stem[-len("00000") :] for path in cache.glob("parts/0000/commits/*.json")]
    return sum(commits.count(unit) == 4 for unit in set(commits))
