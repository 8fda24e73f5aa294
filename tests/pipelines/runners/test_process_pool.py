"""The pool's processes: results in order, errors by their message, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from decant.pipelines.runners.process_pool import process_pool
from decant.pipelines.runners.worker_error import WorkerError
from tests.paths import environment


def product(number: int, shared: int) -> int:
    return number * shared


def numbers_below(number: int, shared: int):
    yield from range(number)


def fail(number: int, shared: int) -> None:
    raise ValueError(f"{number} is wrong")


def own_pid(number: int, shared: int) -> int:
    return os.getpid()


def end_by_signal(number: int, shared: int) -> None:
    os.kill(os.getpid(), number)


def sleep(path: str, shared: int) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


def test_results_come_in_the_order_of_the_arguments():
    with process_pool(2, shared=10) as pool:
        assert list(pool.map(product, range(5))) == [0, 10, 20, 30, 40]
        pids = set(pool.map(own_pid, range(5)))
    assert os.getpid() not in pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_generator_functions_values_come_as_a_list():
    with process_pool(1, shared=0) as pool:
        assert list(pool.map(numbers_below, [0, 2])) == [[], [0, 1]]


def test_an_exception_in_a_process_is_an_error_with_its_message():
    with pytest.raises(WorkerError, match=r"^7 is wrong$"), process_pool(1, shared=0) as pool:
        list(pool.map(fail, [7]))


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_ends_is_an_error_with_the_signal(sent):
    with pytest.raises(WorkerError, match=sent.name), process_pool(2, shared=0) as pool:
        list(pool.map(end_by_signal, [sent]))


def test_an_interrupted_block_kills_the_processes(tmp_path):
    file = tmp_path / "pid"

    def interrupt_once_written(*_) -> None:
        if file.exists() and file.read_text():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt_once_written)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt), process_pool(1, shared=0) as pool:
            next(pool.map(sleep, [str(file)]))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not Path(f"/proc/{file.read_text()}").exists()


PARENT = """
import sys
from decant.pipelines.runners.process_pool import process_pool
from tests.pipelines.runners.test_process_pool import sleep
with process_pool(1, shared=0) as pool:
    list(pool.map(sleep, [sys.argv[1]]))
"""


def test_the_processes_end_when_their_parent_is_killed(tmp_path):
    file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(file)], env=environment())
    while not (file.exists() and file.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    process = Path(f"/proc/{file.read_text()}")
    for _ in range(200):
        if not process.exists() or process.joinpath("stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the process outlived its parent")


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from decant.pipelines.runners.process_pool import process_pool\n"
        "print('begun')\n"
        "with process_pool(2, shared=5) as pool:\n"
        "    print(list(pool.map(max, [1, 9])))\n"
    )
    done = subprocess.run(
        [sys.executable, script], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "begun\n[5, 9]\n"
