"""A link of so many bytes a second and so long a way to an S3 server, in a process of its own.

    python -m tests.making.slow_link ENDPOINT --megabytes 200 --milliseconds 20

The first line that it prints is its address. It ends when its input does.
"""

import argparse
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from tests.making.fault_proxy import FaultProxy, Request
from tests.paths import ROOT


class SlowLink(FaultProxy):
    """Passes all on: an answer comes `seconds` late, and no faster than the link carries it."""

    def __init__(self, endpoint: str, *, bytes_a_second: float, seconds: float):
        super().__init__(endpoint, share=0.0)
        self._rate, self._late = bytes_a_second, seconds
        self._free = {"up": 0.0, "down": 0.0}
        self._turn = threading.Lock()

    def forward(self, request: Request) -> tuple[int, list[tuple[str, str]], bytes]:
        """The server's answer, after the time that a link would need."""
        began = time.monotonic()
        self._carry("up", len(request.body), began)
        status, headers, body = super().forward(request)
        # The server's own time is part of the way, so that a slow one is not counted twice.
        time.sleep(max(began + self._late - time.monotonic(), 0.0))
        self._carry("down", len(body), time.monotonic())
        return status, headers, body

    def _carry(self, way: str, size: int, now: float) -> None:
        """Wait until the link has carried `size` bytes after all that came before."""
        with self._turn:
            self._free[way] = max(self._free[way], now) + size / self._rate
            done = self._free[way]
        time.sleep(max(done - time.monotonic(), 0.0))


@contextlib.contextmanager
def slow_link(endpoint: str, *, megabytes: float, milliseconds: float) -> Iterator[tuple[str, int]]:
    """The address of a running link, and its process."""
    command = [sys.executable, "-m", "tests.making.slow_link", endpoint]
    command += ["--megabytes", str(megabytes), "--milliseconds", str(milliseconds)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("endpoint")
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--milliseconds", type=float, default=20.0)
    options = parser.parse_args()
    link = SlowLink(
        options.endpoint,
        bytes_a_second=options.megabytes * 1e6,
        seconds=options.milliseconds / 1e3,
    )
    with link.serving() as address:
        print(address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
