"""Tokenising in several processes: the same rows, and a clear error if a process fails."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from decant.pipelines.capture.job import precompute
from decant.pipelines.rows.sources import SourceFile
from decant.pipelines.rows.tokenise import local_processes
from decant.pipelines.runners.run_pipeline import IN_PROCESS
from decant.pipelines.runners.worker_error import WorkerError
from tests.making.caches import tiny_cache, tiny_settings
from tests.paths import environment

with_changes = dataclasses.replace


def workers_of_this_process() -> list[int]:
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [int(pid) for path in children for pid in path.read_text().split()]
    return [pid for pid in pids if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text("latin1")]


def killing_one(pids: list[int]) -> threading.Thread:
    """Kill one worker process as soon as there are two; `pids` then holds both."""

    def kill() -> None:
        while len(pids) < 2:
            pids[:] = workers_of_this_process()
            time.sleep(0.05)
        os.kill(pids[0], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def test_a_killed_process_that_tokenises_is_an_error_and_a_rerun_gives_the_same_cache(tmp_path):
    in_one_process = tiny_cache(tmp_path).manifest.cache_id
    config = tiny_settings(tmp_path, output=tmp_path / "processes")
    config = with_changes(config, tokenise_workers=2)
    pids: list[int] = []
    killing_one(pids)
    with pytest.raises(WorkerError, match=r"ended with SIGKILL.*run the same command again"):
        precompute(config)
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert precompute(config).cache_id == in_one_process


@pytest.mark.slow
def test_processes_too_leave_out_documents_of_older_parts(tmp_path):
    ids = []
    for workers in (1, 2):
        root = tmp_path / str(workers)
        tiny_cache(root)
        repeated = (root / "corpus" / "document-001.txt").read_text()
        (root / "corpus" / "repeated.txt").write_text(repeated)
        (root / "corpus" / "new.txt").write_text(repeated[::-1])
        grown = precompute(with_changes(tiny_settings(root), tokenise_workers=workers))
        assert [part.duplicates for part in grown.parts] == [0, 1]
        ids.append(grown.cache_id)
    assert ids[0] == ids[1]


def test_a_process_that_tokenises_gives_the_reason_not_a_traceback(tmp_path):
    config = with_changes(tiny_settings(tmp_path), tokenise_workers=2)
    broken = tmp_path / "corpus" / "broken.txt"
    broken.write_bytes(b"ab\xff")
    with pytest.raises(WorkerError) as raised:
        precompute(config)
    assert str(raised.value).startswith(f"{broken}: not UTF-8 at byte 2. Repair it, or set")


def test_processes_are_as_many_as_have_enough_to_do():
    def chosen(*megabytes: int) -> int:
        files = [SourceFile("a", "a", size << 20, "") for size in megabytes]
        return local_processes(None, files, runner=IN_PROCESS)

    assert chosen(1) == chosen(31, 30) == 1
    assert chosen(10_000) == len(os.sched_getaffinity(0))
    assert local_processes(3, [], runner=IN_PROCESS) == 3
    assert local_processes(3, [], runner="DaskRunner") == 1


def test_a_process_that_tokenises_imports_neither_jax_nor_beam():
    code = (
        "import sys, decant.pipelines.rows.shard, decant.pipelines.runners.process_pool;"
        "sys.exit(bool({'jax', 'apache_beam'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0
