"""Two processes train one student: with the losses of one, stopped together, continued by one."""

import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from decant.models.mesh.sharding import student_mesh
from decant.trainer.config import (
    AttentionLoss,
    Data,
    Distributed,
    HiddenLoss,
    Loss,
    Student,
    StudentMesh,
    Train,
)
from decant.trainer.data.batches import Batches
from decant.trainer.run.metrics_log import read_metrics
from decant.trainer.run.processes import join_processes
from decant.trainer.run.train import train

STEPS = 20


@pytest.fixture(scope="module")
def alone(layered_cache, layered_root, tmp_path_factory) -> Train:
    """A finished run of one process on one device."""
    config = Train(
        cache=layered_cache.path,
        run=tmp_path_factory.mktemp("runs") / "alone",
        student=Student(source=str(layered_root / "teacher"), layers=1),
        data=Data(batch_rows=4, steps=STEPS),
        loss=Loss(
            tail="sampled",
            chunk_tokens=64,
            hidden=(HiddenLoss(weight=0.5),),
            attention=(AttentionLoss(weight=0.5),),
        ),
        checkpoint_every=8,
        evaluate_every=100,
        heldout_rows=3,
    )
    train(config)
    return config


def losses(run):
    return {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line}


def judged(run):
    return {line["step"]: line["heldout_ce"] for line in read_metrics(run) if "heldout_ce" in line}


def flags(config):
    return shlex.split(f"""
        --cache={config.cache} --run={config.run} --student.source={config.student.source}
        --student.layers=1 --data.batch-rows=4 --data.steps={STEPS} --loss.tail=sampled
        --loss.chunk-tokens=64 --loss.hidden.0.weight=0.5 --loss.attention.0.weight=0.5
        --checkpoint-every=8 --evaluate-every=100 --heldout-rows=3
    """)


def start(config, *, process, port):
    """One of two processes with two devices each: rows over both, vocabulary within each."""
    together = f"--mesh.fsdp=2 --mesh.tensor=2 --distributed.coordinator=127.0.0.1:{port} "
    together += f"--distributed.processes=2 --distributed.process={process}"
    return subprocess.Popen(
        [sys.executable, "-m", "decant.trainer", "train", *flags(config), *together.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "NPROC": "32",  # fewer threads than devices deadlock in a collective
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2 "
            "--xla_backend_optimization_level=0",
        },
    )


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def test_two_processes_give_the_losses_of_one_stop_together_and_one_continues(alone, tmp_path):
    """SIGTERM to one process, here the second one, stops both after the same update."""
    config = dataclasses.replace(alone, run=tmp_path / "run")
    port = free_port()
    processes = [start(config, process=number, port=port) for number in (0, 1)]
    metrics = config.run / "metrics.jsonl"
    end = time.monotonic() + 300
    while not (metrics.exists() and '"step": 10,' in metrics.read_text()):
        assert processes[0].poll() is None, processes[0].communicate()
        if time.monotonic() > end:
            for process in processes:
                process.kill()
            pytest.fail("the two processes wait for each other")
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    printed = ["".join(process.communicate(timeout=120)) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "To continue, run the same command again" in printed[0]
    assert "step" not in printed[1]

    together, expected = losses(config.run), losses(alone.run)
    assert list(together) == list(range(1, len(together) + 1))
    assert 10 <= len(together) < STEPS
    train(config)
    continued = losses(config.run)
    assert list(continued) == list(expected)
    np.testing.assert_allclose(list(continued.values()), list(expected.values()), rtol=1e-5)
    assert {step: continued[step] for step in together} == together, "no update ran twice"
    np.testing.assert_allclose(judged(config.run)[0], judged(alone.run)[0], rtol=1e-5)


def test_a_process_reads_its_own_rows_of_every_batch_and_no_others(layered_cache, monkeypatch):
    kind, read, original = type(layered_cache), [], type(layered_cache).read

    def recorded(cache, rows, *args, **kwargs):
        read.append(len(rows))
        return original(cache, rows, *args, **kwargs)

    def read_batches(here):
        batches = Batches(layered_cache, config=Data(batch_rows=4, seed=3), here=here)
        taken = [batches.next() for _ in range(3)], batches.state()
        batches.close()
        return taken

    every, position = read_batches(None)
    monkeypatch.setattr(kind, "read", recorded)
    mine, the_same_position = read_batches(np.array([1, 2]))
    for part, whole in zip(mine, every, strict=True):
        np.testing.assert_array_equal(part["rows"], whole["rows"])
        np.testing.assert_array_equal(part["tokens"], whole["tokens"][[1, 2]])
    assert set(read) == {2}
    assert the_same_position == position, "any number of processes can continue"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Distributed(processes=2, process=0), "distributed.coordinator not given"),
        (Distributed(coordinator="127.0.0.1:1"), "distributed.processes, distributed.process not"),
    ],
)
def test_missing_settings_of_processes_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        join_processes(config)


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(alone, tmp_path):
    config = dataclasses.replace(alone, run=tmp_path / "run", mesh=StudentMesh(fsdp=2, tensor=2))
    with pytest.raises(ValueError, match=r"fsdp = 2, tensor = 2 needs 4 devices.* there are 1"):
        train(config)
    assert not config.run.exists()


def test_every_process_must_have_a_device_in_the_mesh():
    class Device:
        def __init__(self, process_index):
            self.process_index = process_index

    with pytest.raises(ValueError, match="leaves a process without any"):
        student_mesh(data=2, devices=[Device(0), Device(0), Device(1), Device(1)])
