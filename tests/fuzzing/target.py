"""What is fuzzed: a function that reads bytes from a stranger, and honest bytes to start from."""

import dataclasses
import signal
import struct
import zlib
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

ALLOWED = (ValueError, OSError)
"""What a reader may raise for bad input. RecursionError, MemoryError and the like are faults."""
SECONDS = 5
"""A reader that takes longer for one small input is taken to hang."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader of foreign bytes.

    `read` gets a file that holds the bytes, alone in its directory, and reads all that a command
    would. It may raise what is in ALLOWED.
    """

    file: str
    """The file's name, because readers tell kinds apart by names."""
    seeds: Callable[[Path], list[bytes]]
    """Contents of honest files; they may be made in the empty directory that is given."""
    read: Callable[[Path], object]
    is_json: bool = False
    """Mutate values of the parsed JSON as well as bytes."""

    def read_honest(self, data: bytes, directory: Path) -> None:
        """Read a seed, which must succeed: otherwise nothing behind the door is fuzzed."""
        path = directory / self.file
        path.write_bytes(data)
        self.read(path)

    def check(self, data: bytes, directory: Path) -> None:
        """Read `data` as a file in `directory`. Raises whatever `read` must not."""
        path = directory / self.file
        path.write_bytes(data)
        with deadline(), suppress(*ALLOWED):
            self.read(path)


@contextmanager
def deadline():
    """Raises AssertionError when a read takes too long; TimeoutError would be an OSError."""

    def late(*_):
        raise AssertionError(f"still reading after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def right_crc(data: bytes) -> bytes:
    """A cache's record with the checksum that its bytes ask for."""
    crc = zlib.crc32(data[12:], zlib.crc32(data[:8]))
    return data[:8] + struct.pack("<I", crc) + data[12:]
