"""Run captures in processes that kill themselves with SIGKILL at a named step.

The processes are forked from one server process that did the slow imports, so that a test pays only
for the capture. The server must not import TensorStore or initialise JAX's devices before a fork.
"""

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from decant.schemas.disk.steps import Step
from tests.paths import environment

_SERVER = """
import json, os, signal, sys, warnings
import apache_beam, flax.nnx, jax, optax, pyarrow.parquet, rich.progress, tokenizers, tyro
assert "tensorstore" not in sys.modules
warnings.simplefilter("ignore")

def run(stops, arguments, log):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    from decant.schemas.disk import steps
    left = dict(stops)
    def dying(here):
        if here in left:
            left[here] -= 1
            if not left[here]:
                os.write(1, f"killed at {here}\\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)
    steps.reached = dying
    from decant.pipelines.__main__ import main
    return main(arguments)

for line in sys.stdin:
    child = os.fork()
    if not child:
        status = 70
        try:
            status = run(*json.loads(line))
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Killer:
    """Runs commands in forked processes that kill themselves."""

    def __init__(self, server: subprocess.Popen, log: Path):
        self._server = server
        self._log = log

    def kill(self, step: Step, arguments: list[str], *, visit: int = 1) -> None:
        """Run `decant` and kill it at the `visit`-th visit of `step`.

        AssertionError if the step is not visited so often.
        """
        status = self.run({step: visit}, arguments)
        assert status == -signal.SIGKILL, f"{step} not visited\n{self.said()}"

    def run(self, stops: Mapping[Step, int], arguments: list[str]) -> int:
        """Run `decant` and kill it at the first of these steps that it has visited so often.

        Returns the exit status: −9 if it was killed, and `killed_at` tells where.
        """
        assert self._server.stdin
        assert self._server.stdout
        request = json.dumps([stops, arguments, str(self._log)])
        print(request, file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def said(self) -> str:
        """What the last command printed."""
        return self._log.read_text()

    @property
    def killed_at(self) -> Step | None:
        """The step at which the last command was killed."""
        found = re.search("killed at (.*)\n$", self.said())
        return Step(found[1]) if found else None


@contextlib.contextmanager
def killer(log: Path, own: Mapping[str, str] = {}) -> Iterator[Killer]:
    """A `Killer` for the block. Output of the commands goes to `log`.

    `own` are variables of its environment.
    """
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        env=environment() | dict(own),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Killer(server, log)
    finally:
        server.communicate(timeout=60)
