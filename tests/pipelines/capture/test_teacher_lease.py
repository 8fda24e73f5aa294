"""One teacher per host, tested with real worker processes and real signals."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from decant.pipelines.capture import teacher_lease
from decant.pipelines.capture.job import precompute
from decant.pipelines.capture.remaining_units import CaptureUnits
from decant.schemas.disk.layout import part_layout
from decant.schemas.manifest.plan import read_plan
from tests.making.caches import tiny_cache, tiny_settings
from tests.paths import environment

# A worker process that runs the DoFn on the given units, as a Beam runner does. It appends its
# process id to `marks` when it loads a teacher. With `stops` it stops itself before it writes the
# second unit of the part, and does not exit when it is done.
WORKER = """
import os, signal, sys
from pathlib import Path
from decant.pipelines.capture import unit
from decant.pipelines.capture.remaining_units import CaptureUnits
from decant.pipelines.teacher import loaded as teacher
part, marks, stops = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "stops"
load, write = teacher.LoadedTeacher.__init__, unit.write_records

def loading(self, planned):
    with marks.open("a") as file:
        print(os.getpid(), file=file)
    load(self, planned)

def writing(path, records, **rest):
    if stops and len(list(path.parent.glob("unit-*"))) == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return write(path, records, **rest)

teacher.LoadedTeacher.__init__, unit.write_records = loading, writing
units = CaptureUnits(part, part / "plan.json")
units.setup()
for number in map(int, sys.argv[4:]):
    units.process(number)
if stops:
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("host")


@pytest.fixture(scope="module")
def in_process(root) -> str:
    return tiny_cache(root).manifest.cache_id


@pytest.fixture
def planned(root, in_process, tmp_path):
    """Settings and part directory of a cache with a plan, but no captured unit."""
    config = tiny_settings(root, output=tmp_path / "cache")
    shutil.copytree(root / "cache", config.output)
    (config.output / "manifest.json").unlink()
    part = part_layout(config.output, 0)
    shutil.rmtree(part.commits)
    shutil.rmtree(part.root / "logits")
    return config, part.root.resolve()


def worker(part: Path, units, *, stops: bool = False) -> subprocess.Popen:
    marks = part.parent / "loaded"
    command = [sys.executable, "-c", WORKER, str(part), str(marks), "stops" if stops else "runs"]
    return subprocess.Popen(
        [*command, *map(str, units)], env=environment(), stdin=subprocess.PIPE, text=True
    )


def loaded(part: Path) -> list[int]:
    """Process ids that loaded a teacher, in order."""
    marks = part.parent / "loaded"
    return [int(line) for line in marks.read_text().split()] if marks.exists() else []


def wait_until(true, *, of: subprocess.Popen) -> None:
    while not true():
        assert of.poll() is None
        time.sleep(0.01)


def test_one_process_captures_for_all_and_another_takes_over_when_it_is_killed(planned, in_process):
    config, part = planned
    units = range(len(read_plan(part / "plan.json").rows.units))
    first = worker(part, [], stops=True)
    wait_until(lambda: teacher_lease._lock_file(part).exists(), of=first)
    second = worker(part, units)
    try:
        wait_until(lambda: state(first) == "T", of=second)
        assert len(list((part / "commits").glob("logits-*"))) == 1
        assert loaded(part) == [first.pid]
        first.kill()
        assert second.wait(120) == 0
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert loaded(part) == [first.pid, second.pid]
    assert precompute(config).cache_id == in_process


def state(process: subprocess.Popen) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_the_error_of_a_unit_comes_back_to_the_process_that_asked(planned):
    _, part = planned
    (part / "rows" / "unit-00001.array_record").unlink()
    units = CaptureUnits(part, part / "plan.json")
    units.setup()
    try:
        asked = subprocess.run(
            [sys.executable, "-c", WORKER, str(part), str(part.parent / "loaded"), "runs", "1"],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert "RuntimeError" in asked.stderr
        assert "unit-00001.array_record: the manifest names this file, but it is missing" in (
            asked.stderr
        )
        assert loaded(part) == []
    finally:
        teacher_lease.release_lease(part)
    assert not teacher_lease._lock_file(part).exists()


def test_a_lease_released_between_accept_and_use_leaves_the_asker_without_an_answer(tmp_path):
    """So it asks again. Another process, here a second descriptor, has the lease by then."""
    with teacher_lease._leased(tmp_path):
        pass
    file = teacher_lease._lock_file(tmp_path)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(teacher_lease._socket_file(file)))
        wait_until_accepted()
        teacher_lease.release_lease(tmp_path)
        taken = teacher_lease._lock_descriptor(file)
        try:
            connection.sendall(b'{"unit": 0, "plan": "plan.json"}\n')
            assert connection.makefile().readline() == ""
        finally:
            os.close(taken)
            file.unlink()


def wait_until_accepted() -> None:
    """Wait until a thread of this process reads from the other end."""
    deadline = time.monotonic() + 20
    while not any("_answer" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_idle_process_releases_the_lease_and_one_that_asks_gets_it_at_once(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(teacher_lease, "IDLE_SECONDS", 0.0)
    with teacher_lease._leased(tmp_path):
        time.sleep(1.5)  # longer than it waits between looks: it is in use
        assert teacher_lease._lock_file(tmp_path).exists()
    deadline = time.monotonic() + 20
    while teacher_lease._lock_file(tmp_path).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    monkeypatch.setattr(teacher_lease, "IDLE_SECONDS", 1e9)
    with teacher_lease._leased(tmp_path):
        pass
    code = "import sys; from pathlib import Path; from types import SimpleNamespace as N; " + (
        "from decant.pipelines.capture.teacher_lease import with_teacher; "
        "with_teacher(N(part=Path(sys.argv[1])), print)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment(), timeout=60
    )
    assert done.returncode == 0
