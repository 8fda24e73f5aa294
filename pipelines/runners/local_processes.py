"""Worker processes of this machine for Beam's own runner, and what such a process runs.

Beam has them too, but waits for ever for the answer of one that was killed, and cannot be
interrupted while they work.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading

from apache_beam.portability import python_urns
from apache_beam.portability.api import beam_fn_api_pb2, endpoints_pb2
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.portability.fn_api_runner.worker_handlers import (
    GrpcWorkerHandler,
    WorkerHandler,
)
from apache_beam.runners.worker import sdk_worker_main
from apache_beam.transforms.environments import SubprocessSDKEnvironment
from google.protobuf import json_format, text_format

_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.2


def engine() -> FnApiRunner:
    """Beam's own runner with processes instead of threads; `--direct_num_workers` says how many."""
    return FnApiRunner(SubprocessSDKEnvironment.from_command_string(""))


@WorkerHandler.register_environment(python_urns.SUBPROCESS_SDK, bytes)
class _Process(GrpcWorkerHandler):
    """A worker process as the runner sees it; stands in for Beam's class of the same purpose."""

    def __init__(self, command, state, provision_info, grpc_server):
        super().__init__(state, provision_info, grpc_server)
        self._provided = provision_info.provision_info
        self._closing = threading.Event()

    def start_worker(self) -> None:
        """Start it, and somebody who waits for its end."""
        address = endpoints_pb2.ApiServiceDescriptor(url=self.control_address)
        told = {
            "CONTROL_API_SERVICE_DESCRIPTOR": text_format.MessageToString(address),
            "PIPELINE_OPTIONS": json_format.MessageToJson(self._provided.pipeline_options),
            "WORKER_ID": self.worker_id,
        }
        # Where this process finds its modules, whatever it was started as.
        code = f"import sys; sys.path[:] = {json.dumps(sys.path)}; " + (
            f"from {__name__} import work; work()"
        )
        self._process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | told)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        status = self._process.wait()
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        lost = (
            f"a worker process of this machine ended with {how} in the middle of its work; was it "
            "out of memory? What it had finished stays: run the same command again, with fewer "
            "tokenise_workers if memory is short [while running on this machine]"
        )
        # Again and again: what was not asked of it before it ended may be asked later.
        while not self._closing.wait(_POLL_SECONDS):
            for request in list(self._pending):
                # Not `abort`, which does not wake who waits for the elements of the answer.
                answer = beam_fn_api_pb2.InstructionResponse(instruction_id=request, error=lost)
                self._pending.pop(request).set(answer)

    @property
    def _pending(self) -> dict:
        """Requests that it has not answered."""
        return self.control_conn._futures_by_id

    def close(self) -> None:
        """End it; at once if it is in the middle of something, whose result nobody wants."""
        self._closing.set()
        if self._pending:
            self._process.kill()
        super().close()

    def stop_worker(self) -> None:
        """Wait for its end."""
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def work() -> None:
    """What the process runs: Beam's worker, but quiet, since what matters goes to the driver.

    Tokenizers keep to one thread: there is a process for each core.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C in a terminal reaches every process; the driver ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    # When the runner is gone, nothing needs to be said of it, by any thread.
    threading.excepthook = lambda _: None
    with contextlib.suppress(Exception):
        sdk_worker_main.main([])
