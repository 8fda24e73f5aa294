"""A real full disk while a real command trains: one message, and with space the run goes on."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from decant.trainer.run.checkpoint import CHECKPOINTS, latest_step
from decant.trainer.run.metrics_log import read_metrics
from tests.paths import environment


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk with room for two checkpoints of the student below, and not for three."""
    directory = tmp_path / "disk"
    directory.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=15m", "tmpfs", str(directory)]
    if subprocess.run(options, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def train(cache: Path, run: Path, *, limit: str = "unlimited") -> subprocess.CompletedProcess:
    """Run the command, in a shell that limits the size of files to `limit` KiB."""
    settings = {
        "cache": cache,
        "run": run,
        "student.init": "scratch",
        "student.layers": 6,
        "student.hidden-size": 128,
        "data.steps": 5,
        "loss.tail": "bucket",
        "checkpoint-every": 1,
        "heldout-rows": 1,
        "keep.last": 9,
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "decant", "train", *flags, "--no-compilation-cache", "--quiet"]
    shell = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *command]
    return subprocess.run(shell, env=environment(), capture_output=True, text=True, check=False)


def messages(done: subprocess.CompletedProcess) -> list[str]:
    return done.stderr.splitlines()


def test_a_full_disk_is_one_message_and_the_run_goes_on_with_space(cache, small_disk):
    run = small_disk / "run"
    done = train(cache.path, run)
    assert done.returncode == 1
    (message,) = messages(done)
    step = latest_step(run)
    assert step in (1, 2)
    assert (
        f"run: the disk is full, so training stopped. Its checkpoint after update {step}, of"
        in (message)
    )
    assert " MB, is safe. Free some space and run the same command again" in message
    assert not list((run / CHECKPOINTS).glob("*tmp*"))
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    assert train(cache.path, run).returncode == 0
    steps = [line["step"] for line in read_metrics(run) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("limit", ["1500", "2100"])
def test_files_that_may_not_grow_are_one_message_too(cache, tmp_path, limit):
    """The smaller limit stops the initial student, the larger one a checkpoint.

    A checkpoint of 5.6 MB is one large file and perhaps some smaller ones, as its writers come. So
    one may pass below the larger limit by chance; the message then has to name it.
    """
    run = tmp_path / "run"
    done = train(cache.path, run, limit=limit)
    assert done.returncode == 1
    (message,) = messages(done)
    assert "run: a file would exceed the limit on its size, so training stopped" in message
    step = latest_step(run)
    safe = f"Its checkpoint after update {step}, of" if step else "It had no checkpoint yet."
    assert safe in message
    assert "Raise the limit (ulimit -f)" in message
    assert done.stdout == ""
    updates = range(step + 2) if limit == "2100" else []
    metrics = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    assert [line["step"] for line in metrics if "loss" in line or line["step"] == 0] == list(
        updates
    )
    assert not list(tmp_path.rglob("model.safetensors.partial"))
