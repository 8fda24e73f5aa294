"""A pool of worker processes on this machine. They end when this process ends, however it does.

Beam's in-process runner can start processes too. But it waits forever for a process that was
killed, and cannot be interrupted while the processes work.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from decant.pipelines.runners.worker_error import WorkerError


@contextlib.contextmanager
def process_pool(processes: int, *, shared: Any) -> Iterator["ProcessPool"]:
    """A pool of `processes`. Each process gets a copy of `shared` when it starts.

    If the `with` block raises, the processes are killed at once.
    """
    pool = ProcessPool(processes, shared=shared)
    try:
        yield pool
    except BaseException:
        pool.kill()
        raise
    finally:
        pool.join()


class ProcessPool:
    """Maps functions over arguments in other processes. Use it through `process_pool`."""

    def __init__(self, processes: int, *, shared: Any):
        # Spawned, not forked: a forked copy lacks the threads of jax and Beam, and may hang.
        self._context = _SpawnContext()
        self._executor = ProcessPoolExecutor(
            processes, mp_context=self._context, initializer=_begin, initargs=(shared,)
        )

    def map(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
        """Like `map`, but calls `function(*values, shared)` in the processes; results in order.

        The result of a generator function is a list of its values. WorkerError with the message of
        the exception that the function raised, or, if a process was killed, with the signal's name.
        """
        results = self._executor.map(_call, itertools.repeat(function), *arguments)
        try:
            yield from results
        except BrokenProcessPool as error:
            self.join()
            raise WorkerError(
                f"a worker process of this machine ended with {self._status()} in the middle of "
                "its work; was memory short? Finished work is kept: run the same command again, "
                "with fewer tokenise_workers if memory is short"
            ) from error
        except Exception as error:
            raise WorkerError(str(error) or repr(error)) from error

    def kill(self) -> None:
        """Kill the processes."""
        for process in self._context.started:
            if process.is_alive():
                process.kill()

    def join(self) -> None:
        """Cancel all calls that have not begun, and wait until the processes have ended."""
        self._executor.shutdown(cancel_futures=True)

    def _status(self) -> str:
        """The signal or exit status of the process that failed; the executor sent the others
        SIGTERM."""
        codes = [process.exitcode for process in self._context.started]
        code = next((c for c in codes if c and c != -signal.SIGTERM), -signal.SIGTERM)
        return signal.Signals(-code).name if code < 0 else f"status {code}"


class _SpawnContext(SpawnContext):
    """Remembers the processes that it started, which an executor does not make public."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:
        process = _Process(*args, **kwargs)
        self.started.append(process)
        return process


class _Process(SpawnProcess):
    """A process that does not run the user's script again.

    A spawned process imports the file of `__main__`, so a script without `if __name__ ==
    "__main__":` would start a second capture. Our functions need nothing from that file.
    """

    def start(self) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


_shared: Any = None


def _begin(shared: Any) -> None:
    """Prepare a worker process."""
    global _shared
    _shared = shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process per core already
    # Ctrl-C in a terminal reaches every process. The parent process then kills this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    result = function(*arguments, _shared)
    return list(result) if isinstance(result, Iterator) else result  # a generator has no pickle
