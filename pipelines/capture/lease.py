"""One teacher a host: the worker process that has the host's lease captures for all of them.

A runner may start several processes on a host, Dask one a core, and each would load a teacher of
its own. The lease is a lock on a file, which goes with the process that holds it however that
ends. The holder listens on a socket beside it, and the others hand it their units and wait; if
it dies, the first to notice takes the lease, loads the teacher and goes on. Commits decide what
is done, so a unit that is asked for twice is captured once or twice to the same bytes.
"""

import contextlib
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam

from decant.pipelines.teacher import inference as teacher
from decant.schemas.disk.identity import digest

IDLE_SECONDS = 60.0
"""After this long without a unit the holder gives up the lease and its teacher's memory."""
_RETRY_SECONDS = 0.1
# Processes that see other devices have a teacher each.
_DEVICES = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "TPU_VISIBLE_CHIPS",
    "TPU_VISIBLE_DEVICES",
)

_lock = threading.Lock()
_held: dict[Path, "_Lease"] = {}


class CaptureUnits(beam.DoFn):
    """Captures units of a part by the plan at `plan`; in Beam's words, a `DoFn`."""

    def __init__(self, part: Path, plan: Path):
        self._part, self._plan = part, plan

    def setup(self) -> None:
        """Take the lease if nobody has it, before others start to load anything."""
        with contextlib.suppress(_Taken), _leased(self._part):
            pass

    def process(self, number: int) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Capture a unit, here or by the process of this host that has the teacher."""
        while True:
            with contextlib.suppress(_Taken), _leased(self._part) as lease:
                lease.capture(number, self._plan)
                return
            if _ask(self._part, {"unit": number, "plan": str(self._plan)}):
                return
            time.sleep(_RETRY_SECONDS)


def with_teacher(job: Any, step: Callable[[Any], None]) -> None:
    """Do a step of `job.part` that runs the teacher; this process then has the lease until it is
    idle or another one needs it for such a step."""
    while True:
        with contextlib.suppress(_Taken), _leased(job.part):
            step(job)
            return
        _ask(job.part, {"leave": True})
        time.sleep(_RETRY_SECONDS)


def leave(part: Path) -> None:
    """Give up this process's lease for `part`, if it has it; its teacher stays in memory."""
    with _lock:
        lease = _held.get(_lock_file(part))
        if lease and not lease.users:
            lease.release()


class _Taken(Exception):
    """Another process of this host has the lease."""


@contextlib.contextmanager
def _leased(part: Path) -> Iterator["_Lease"]:
    """This process's lease, which it takes now or has already. _Taken if another one has it."""
    file = _lock_file(part)
    with _lock:
        if file not in _held:
            _held[file] = _Lease(part, file)
            threading.Thread(target=_held[file].serve, daemon=True).start()
        lease = _held[file]
        lease.users += 1
    try:
        yield lease
    finally:
        with _lock:
            lease.users -= 1
            lease.used = time.monotonic()


class _Lease:
    """A held lease, and the thread that serves the host's other processes."""

    def __init__(self, part: Path, file: Path):
        self._part, self._file = part, file
        self._descriptor = _locked(file)
        self.users = 0
        self.used = time.monotonic()
        # Two at once: one is written and hashed while the devices have the other.
        self._turn = threading.Semaphore(2)
        _socket_of(file).unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(_socket_of(file)))
        self._listener.listen(128)
        self._listener.settimeout(1.0)

    def capture(self, number: int, plan: Path) -> None:
        """Capture a unit in this process."""
        # Here, because capture compares with what calibration found, which has the lease first.
        from decant.pipelines.capture.unit import capture_unit

        with self._turn:
            capture_unit(number, self._part, plan)

    def release(self) -> None:
        """Stop serving and let another process have it. `_lock` must be held."""
        del _held[self._file]
        self._listener.close()
        for path in (_socket_of(self._file), self._file):
            path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def serve(self) -> None:
        """Answer until it is released, and release it when nobody asks for long."""
        while _held.get(self._file) is self:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                self._leave_if(idle=IDLE_SECONDS)
            except OSError:
                return  # released
            else:
                threading.Thread(target=self._answer, args=[connection], daemon=True).start()

    def _leave_if(self, *, idle: float) -> None:
        with _lock:
            unused = not self.users and time.monotonic() - self.used >= idle
            if not unused or _held.get(self._file) is not self:
                return
            from decant.pipelines.capture.unit import forget_worker

            forget_worker()
            teacher.unload()
            self.release()

    def _answer(self, connection: socket.socket) -> None:
        # An asker that is gone needs no answer.
        with contextlib.suppress(OSError, ValueError), connection:
            asked = json.loads(connection.makefile().readline())
            if asked.get("leave"):
                self._leave_if(idle=0.0)
                return
            connection.sendall(json.dumps({"error": self._captured(asked)}).encode() + b"\n")

    def _captured(self, asked: dict) -> str:
        """The error of capturing it, or nothing."""
        try:
            with _leased(self._part):
                self.capture(asked["unit"], Path(asked["plan"]))
        except Exception as error:
            return str(error) or repr(error)
        return ""


def _ask(part: Path, what: dict) -> bool:
    """Ask the holder and wait for its answer; whether there was one. RuntimeError if it failed."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(_socket_of(_lock_file(part))))
            connection.sendall(json.dumps(what).encode() + b"\n")
            answer = connection.makefile().readline()
    except OSError:
        return False  # it has gone, or does not listen yet
    if not answer:
        return False
    if error := json.loads(answer)["error"]:
        raise RuntimeError(error)
    return True


def _locked(file: Path) -> int:
    """The descriptor that holds the lock. _Taken if another process does."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The one before may have removed the file since it was opened.
        if file.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    raise _Taken


def _lock_file(part: Path) -> Path:
    """One for a part, host, user and set of devices, where this host's processes find it."""
    directory = Path(tempfile.gettempdir()) / f"decant-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise PermissionError(
            f"{directory}: belongs to another user; set TMPDIR to a place of yours"
        )
    devices = {name: os.environ.get(name) for name in _DEVICES}
    return directory / digest([str(part.resolve()), socket.gethostname(), devices])[:16]


def _socket_of(lock_file: Path) -> Path:
    return lock_file.with_suffix(".sock")
