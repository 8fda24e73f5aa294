"""One teacher per host: of all worker processes, the one with the host's lease runs the teacher.

A runner may start several processes on a host (Dask: one per core); without the lease each would
load its own teacher. The lease is a lock on a file, which the operating system releases however the
holder ends. The holder listens on a socket beside the file; other processes send it their units
and wait. If the holder dies, the first process to notice takes the lease, loads the teacher and
goes on. Commits decide which units are done: a unit that is requested twice is captured once, or
twice to the same bytes.

Beam's MultiProcessShared was tried and would not save the retry loop: if its owner is killed, a
waiting process gets EOFError and its instance never connects again. Its owner also unpickles what
comes in on a TCP port that every user of the host can open with a published key, and it keeps the
object until it ends: it cannot hand the teacher over when idle or when asked.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from decant.pipelines.capture.private_directory import private_directory, socket_address
from decant.pipelines.capture.unit import capture_unit, forget_worker
from decant.pipelines.teacher import loaded
from decant.schemas.disk.identity import digest

IDLE_SECONDS = 60.0
"""After this long without a unit the holder releases the lease and its teacher's memory."""
_RETRY_SECONDS = 0.1
# Processes that see different devices each have a teacher.
_DEVICES = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "TPU_VISIBLE_CHIPS",
    "TPU_VISIBLE_DEVICES",
)

_lock = threading.Lock()
_held: dict[Path, "_Lease"] = {}
"""Leases of this process, by lock file."""


def take_lease(part: Path) -> None:
    """Take the host's lease for `part`, unless another process has it. Loads nothing yet."""
    with contextlib.suppress(_Taken), _leased(part):
        pass


def capture_on_host(number: int, part: Path, plan: Path) -> None:
    """Capture unit `number`, in this process or in the one of this host that has the lease.

    `plan` is the path of the plan file. RuntimeError with the holder's message if it fails there.
    """
    while True:
        with contextlib.suppress(_Taken), _leased(part) as lease:
            lease.capture(number, plan)
            return
        if _ask_holder(part, {"unit": number, "plan": str(plan)}):
            return
        time.sleep(_RETRY_SECONDS)


def with_teacher(job: Any, step: Callable[[Any], None]) -> None:
    """Call `step(job)`, which runs the teacher for `job.part`, while holding the lease.

    Another holder is asked to give the lease up, and does so once it is idle. This process keeps
    the lease until it is idle for IDLE_SECONDS or is asked in turn.
    """
    while True:
        with contextlib.suppress(_Taken), _leased(job.part):
            step(job)
            return
        _ask_holder(job.part, {"leave": True})
        time.sleep(_RETRY_SECONDS)


def release_lease(part: Path) -> None:
    """Release this process's lease for `part`, if it has it; its teacher stays in memory."""
    with _lock:
        lease = _held.get(_lock_file(part))
        if lease and not lease.users:
            lease.release()


class _Taken(Exception):
    """Another process of this host has the lease."""


@contextlib.contextmanager
def _leased(part: Path) -> Iterator["_Lease"]:
    """This process's lease, taken now if it has none. _Taken if another process has it."""
    file = _lock_file(part)
    with _lock:
        if file not in _held:
            _held[file] = _Lease(part, file)
            threading.Thread(target=_held[file].serve, daemon=True).start()
        lease = _held[file]
        lease.users += 1
    with lease.counted():
        yield lease


class _Lease:
    """A held lease, and the thread that serves the host's other processes."""

    def __init__(self, part: Path, file: Path):
        self._part, self._file = part, file
        self.users = 0
        self.used = time.monotonic()
        # Two units at once: one is written and hashed while the devices compute the other.
        self._turn = threading.Semaphore(2)
        self._descriptor = _lock_descriptor(file)
        try:
            self._listener = _listening_socket(_socket_file(file))
        except BaseException:
            os.close(self._descriptor)
            raise

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count one of `users` out again at the end of the `with` block."""
        try:
            yield
        finally:
            with _lock:
                self.users -= 1
                self.used = time.monotonic()

    def capture(self, number: int, plan: Path) -> None:
        """Capture a unit in this process."""
        with self._turn:
            capture_unit(number, self._part, plan)

    def release(self) -> None:
        """Stop serving and let another process take the lease. The caller must hold `_lock`."""
        del _held[self._file]
        self._listener.close()
        for path in (_socket_file(self._file), self._file):
            path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def serve(self) -> None:
        """Answer requests until the lease is released, here after IDLE_SECONDS without one."""
        while _held.get(self._file) is self:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                self._release_if_idle(seconds=IDLE_SECONDS)
            except OSError:
                return  # released
            else:
                threading.Thread(target=self._answer, args=[connection], daemon=True).start()

    def _release_if_idle(self, *, seconds: float) -> None:
        with _lock:
            idle = not self.users and time.monotonic() - self.used >= seconds
            if not idle or _held.get(self._file) is not self:
                return
            forget_worker()
            loaded.unload()
            self.release()

    def _answer(self, connection: socket.socket) -> None:
        # Errors of the connection are ignored: a client that is gone needs no answer.
        with contextlib.suppress(OSError, ValueError), connection:
            request = json.loads(connection.makefile().readline())
            if request.get("leave"):
                self._release_if_idle(seconds=0.0)
            elif self._still_held():
                with self.counted():
                    answer = {"error": self._capture_requested(request)}
                connection.sendall(json.dumps(answer).encode() + b"\n")

    def _still_held(self) -> bool:
        """Add a user, unless the lease was released since the request's connection was accepted.

        Without an answer the other process asks again, then the new holder or for the lease itself.
        """
        with _lock:
            held = _held.get(self._file) is self
            self.users += held
            return held

    def _capture_requested(self, request: dict) -> str:
        """Capture the requested unit. Returns the error message, empty if there was none."""
        try:
            self.capture(request["unit"], Path(request["plan"]))
        except Exception as error:
            return str(error) or repr(error)
        return ""


def _listening_socket(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    with socket_address(path) as address:
        listener.bind(address)
    listener.listen(128)
    listener.settimeout(1.0)
    return listener


def _ask_holder(part: Path, request: dict) -> bool:
    """Send a request to the lease's holder; returns whether it answered.

    RuntimeError with the holder's message if the request failed there.
    """
    path = _socket_file(_lock_file(part))
    try:
        with socket.socket(socket.AF_UNIX) as connection, socket_address(path) as address:
            connection.connect(address)
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer = connection.makefile().readline()
    except OSError:
        return False  # the holder is gone, or does not listen yet
    if not answer:
        return False
    if error := json.loads(answer)["error"]:
        raise RuntimeError(error)
    return True


def _lock_descriptor(file: Path) -> int:
    """An open descriptor that holds the lock on `file`. _Taken if another process holds it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(file, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The last holder may have removed the file after we opened it.
        if file.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    raise _Taken


def _lock_file(part: Path) -> Path:
    """The lock file for this part, host, user and set of devices, in the temporary directory."""
    devices = {name: os.environ.get(name) for name in _DEVICES}
    return private_directory() / digest([str(part.resolve()), socket.gethostname(), devices])[:16]


def _socket_file(lock_file: Path) -> Path:
    return lock_file.with_suffix(".sock")
