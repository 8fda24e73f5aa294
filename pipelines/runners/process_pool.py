"""A pool of worker processes on this machine, which ends whenever this process does.

Beam's in-process runner can start processes too, but waits for ever for one that was killed, and
cannot be interrupted while they work.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from decant.pipelines.runners.worker_error import WorkerError


@contextlib.contextmanager
def process_pool(processes: int, *, shared: Any) -> Iterator["ProcessPool"]:
    """A pool of `processes`, each of which gets `shared` once, as it starts.

    If the block raises, the processes are killed in the middle of their work.
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
        # Not forked: a fork copies no thread, and jax and Beam have some.
        self._context = _SpawnContext()
        self._executor = ProcessPoolExecutor(
            processes, mp_context=self._context, initializer=_begin, initargs=(shared,)
        )

    def map(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
        """`function(*values, shared)` for each tuple of `arguments`; results in their order.

        WorkerError with the message of the exception that the function raised, or with the
        signal's name if a process was killed.
        """
        results = self._executor.map(_call, itertools.repeat(function), *arguments)
        try:
            yield from results
        except BrokenProcessPool as error:
            self.join()
            raise WorkerError(
                f"a worker process of this machine ended with {self._status()} in the middle of "
                "its work; was it out of memory? What it had finished stays: run the same command "
                "again, with fewer tokenise_workers if memory is short"
            ) from error
        except Exception as error:
            raise WorkerError(str(error) or repr(error)) from error

    def kill(self) -> None:
        """End the processes at once."""
        for process in self._context.started:
            if process.is_alive():
                process.kill()

    def join(self) -> None:
        """Start no further call, and wait until the processes have ended."""
        self._executor.shutdown(cancel_futures=True)

    def _status(self) -> str:
        """How the first process that ended badly did; the executor terminates the others."""
        codes = [process.exitcode for process in self._context.started]
        code = next((c for c in codes if c and c != -signal.SIGTERM), -signal.SIGTERM)
        return signal.Signals(-code).name if code < 0 else f"status {code}"


class _SpawnContext(SpawnContext):
    """Remembers the processes that it started: an executor does not tell which are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:
        process = SpawnProcess(*args, **kwargs)
        self.started.append(process)
        return process


_shared: Any = None


def _begin(shared: Any) -> None:
    """Prepare a worker process. Tokenizers keep to one thread, as there is a process a core."""
    global _shared
    _shared = shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C in a terminal reaches every process; the one that has the pool ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments, _shared)
