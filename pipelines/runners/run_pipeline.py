"""Runs a Beam pipeline on a named runner, and reports a worker's error in its own words."""

import re
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.runner import PipelineRunner, create_runner

from decant.pipelines.runners.worker_error import WorkerError

Build = Callable[[beam.Pipeline], Any]
IN_PROCESS = "FnApiRunner"
# Beam finds its other runners by their short names.
_DASK = "DaskRunner", "apache_beam.runners.dask.dask_runner.DaskRunner"
# Beam appends the step to a message, and puts the exception's name before some messages.
_ADDED = re.compile(r"\s*\[while running .*", re.DOTALL)
_NAMED = re.compile(r"(?:ValueError|RuntimeError|FileNotFoundError): ")


def run_pipeline(build: Build, *, runner: str, options: Sequence[str]) -> None:
    """Build a pipeline and run it to its end.

    `runner` is `IN_PROCESS`, `DaskRunner`, or any name that Beam knows. `options` are Beam options,
    with or without leading dashes. WorkerError if a step fails.
    """
    # Users write them without dashes: with dashes our own command line would parse them.
    options = [o if o.startswith("--") else f"--{o}" for o in options]
    if runner in _DASK and not any(o.startswith(("--dask_np", "--dask_pa")) for o in options):
        # By default Beam makes one Dask task of 128 units, and other workers would be idle.
        options = [*options, "--dask_partition_size=1"]
    try:
        pipeline = beam.Pipeline(_beam_runner(runner), PipelineOptions(list(options)))
        # Beam would name steps after a notebook's cells, for which it imports pandas.
        with patch("apache_beam.pipeline.alter_label_if_ipython", lambda *_: None):
            build(pipeline)
            _finish(pipeline)
    except Exception as error:
        # Ctrl-C interrupts a step of the in-process runner, which wraps it like other errors.
        if "KeyboardInterrupt" in str(error):
            raise KeyboardInterrupt from error
        # The message tells a worker's error: its type is the worker's own or RuntimeError.
        if "[while running " not in str(error):
            raise
        raise WorkerError(_worker_message(str(error))) from error


def _worker_message(text: str) -> str:
    """The message that the worker raised, without Beam's additions."""
    message, traceback, _ = text.partition("Traceback (most recent call last)")
    if traceback and not message.strip():
        # From another process: a traceback, whose last line of code precedes the message.
        message = text.rsplit('\n  File "', 1)[-1]
        message = re.split(r"\n(?! )", message, maxsplit=1)[-1]
    return _NAMED.sub("", _ADDED.sub("", message).strip(), count=1)


def _beam_runner(runner: str) -> PipelineRunner:
    if runner != IN_PROCESS:
        return create_runner(_DASK[1] if runner in _DASK else runner)
    # Not Beam's default, DirectRunner, which first tries to download another runner: the choice
    # must not depend on the network.
    return FnApiRunner()


def _finish(pipeline: beam.Pipeline) -> None:
    result = pipeline.run()
    try:
        result.wait_until_finish()
    finally:
        # A job is several pipelines. On Dask, each would leave a connection open and, if no
        # scheduler was named, a cluster running.
        if client := getattr(result, "client", None):
            client.close()
