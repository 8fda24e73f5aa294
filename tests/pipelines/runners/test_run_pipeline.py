"""The same pipeline on Beam's in-process runner and on a Dask cluster."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import apache_beam as beam
import pytest
from apache_beam.runners.dask.dask_runner import DaskOptions
from apache_beam.runners.runner import PipelineRunner

from decant.pipelines.capture.job import precompute
from decant.pipelines.runners.run_pipeline import run_pipeline
from tests.making.caches import tiny_cache, tiny_settings
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
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(root / "dask-scratch")],
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
