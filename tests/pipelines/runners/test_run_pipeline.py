"""The same pipeline on Beam's in-process runner and on a Dask cluster."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import apache_beam as beam
import pytest
from apache_beam.runners.dask.dask_runner import DaskOptions
from apache_beam.runners.runner import PipelineRunner
from distributed import Client

from decant.pipelines.alignment.job import align
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Align
from decant.pipelines.runners.run_pipeline import run_pipeline
from tests.making.caches import tiny_cache, tiny_settings, tokenizer_files
from tests.making.uploaded import upload
from tests.paths import environment

with_changes = dataclasses.replace


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runners")


@pytest.fixture(scope="module")
def in_process(root) -> str:
    return tiny_cache(root).manifest.cache_id


class Recorder(PipelineRunner):
    """Runs nothing and records the options that Dask would get."""

    def __init__(self, told: list[DaskOptions]):
        self._told = told

    def run_pipeline(self, pipeline, options):
        self._told.append(options.view_as(DaskOptions))
        return SimpleNamespace(wait_until_finish=lambda: None)


@pytest.mark.parametrize(
    "runner", ["DaskRunner", "apache_beam.runners.dask.dask_runner.DaskRunner"]
)
@pytest.mark.parametrize(
    ("options", "size", "count"),
    [
        ([], 1, None),
        (["dask_client_address=tcp://nowhere:1"], 1, None),
        (["dask_partition_size=5"], 5, None),
        (["--dask_npartitions=3"], None, 3),
    ],
)
def test_a_unit_is_one_dask_task_unless_options_say_otherwise(
    monkeypatch, runner, options, size, count
):
    """By default Beam makes one task of 128 units, and the cluster's other workers are idle."""
    told: list[DaskOptions] = []
    monkeypatch.setattr(
        "decant.pipelines.runners.run_pipeline.create_runner", lambda _: Recorder(told)
    )
    run_pipeline(lambda p: p | beam.Create([1]), runner=runner, options=options)
    (given,) = told
    assert (given.partition_size, given.npartitions) == (size, count)


# Starts a scheduler and two workers as processes; prints the scheduler's address and the workers'
# process ids; ends when its standard input is closed.
CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50,
        local_directory=sys.argv[1], host="127.0.0.1", protocol="tcp",
    ) as cluster:
        print(cluster.scheduler_address, *(w.pid for w in cluster.workers.values()), flush=True)
        sys.stdin.read()
"""


@pytest.fixture(scope="module")
def dask(root):
    """The address of a cluster, and its workers' process ids."""
    with dask_cluster(root / "dask-scratch") as cluster:
        yield cluster


@contextlib.contextmanager
def dask_cluster(scratch: Path) -> Iterator[tuple[str, list[int]]]:
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(scratch)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        address, *pids = process.stdout.readline().split()
        yield address, [int(pid) for pid in pids]
    finally:
        process.communicate("", timeout=60)


def test_a_dask_cluster_gives_the_same_cache_though_a_worker_is_killed_in_a_unit(
    root, in_process, dask
):
    address, pids = dask
    config = tiny_settings(root, output=root / "dask")
    options = (f"dask_client_address={address}",)
    config = with_changes(config, runner="DaskRunner", runner_options=options)
    killed: list[int] = []

    def kill_a_writer() -> None:
        """Once two units are done, kill the worker that has a temporary file open."""
        rows = config.output / "parts" / "0000" / "logits"
        while not killed:
            if len(list(rows.glob("unit-*"))) >= 2:
                writing = [int(path.name.split(".")[3]) for path in rows.glob(".*.tmp")]
                killed.extend(pid for pid in pids if pid in writing)
            time.sleep(0.001)
        os.kill(killed[0], signal.SIGKILL)

    threading.Thread(target=kill_a_writer, daemon=True).start()
    assert precompute(config).cache_id == in_process
    assert killed
    assert not Path(f"/proc/{killed[0]}").exists()


def test_align_on_a_dask_cluster_gives_the_same_cache(root, in_process, dask, tmp_path):
    (tmp_path / "student").mkdir()
    for name, data in tokenizer_files(300).items():
        (tmp_path / "student" / name).write_bytes(data)
    here = Align(
        cache=root / "cache",
        tokenizer=str(tmp_path / "student"),
        output=tmp_path / "here",
        quiet=True,
    )
    options = (f"dask_client_address={dask[0]}",)
    there = dataclasses.replace(
        here, output=tmp_path / "there", runner="DaskRunner", runner_options=options
    )
    assert align(there).cache_id == align(here).cache_id


def on_a_machine_of_its_own(base: str) -> None:
    """Give this worker a folder that no other process knows."""
    own = Path(base, str(os.getpid()))
    own.mkdir(parents=True)
    os.environ["DECANT_MIRROR"] = tempfile.tempdir = str(own)


@pytest.mark.slow  # a killed worker: above; a capture killed in a bucket: test_killed_in_bucket.py
def test_dask_workers_that_share_only_a_bucket_give_the_same_cache_though_one_is_killed(
    root, in_process, bucket, tmp_path, monkeypatch
):
    """Text, teacher and cache are in the bucket; each worker has a teacher."""
    monkeypatch.setenv("DECANT_MIRROR", str(tmp_path / "driver"))
    corpus, teacher = (upload(root / n, f"{bucket}/{n}") for n in ("corpus", "teacher"))
    config = tiny_settings(root, output=Path(f"{bucket}/cache"))
    killed: list[int] = []

    def kill_a_writer() -> None:
        """Kill the first worker that writes a unit of logits."""
        while not killed:
            writing = list(tmp_path.glob("workers/*/*/*/scratch/*-unit-*.array_record"))
            killed.extend(int(path.name.partition("-")[0]) for path in writing[:1])
            time.sleep(0.001)
        os.kill(killed[0], signal.SIGKILL)

    with dask_cluster(tmp_path / "dask") as (address, _):
        with Client(address) as client:
            client.run(on_a_machine_of_its_own, str(tmp_path / "workers"))
        config = with_changes(
            config,
            corpus=with_changes(config.corpus, files=(f"{corpus}/*.txt",)),
            teacher=with_changes(config.teacher, model=teacher),
            runner="DaskRunner",
            runner_options=(f"dask_client_address={address}",),
        )
        threading.Thread(target=kill_a_writer, daemon=True).start()
        assert precompute(config).cache_id == in_process
    assert killed
    assert not Path(f"/proc/{killed[0]}").exists()
