"""Running a Beam pipeline by a named runner, and getting a worker's error back as it was meant."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.runner import PipelineRunner, create_runner

from decant.pipelines.runners.worker_error import WorkerError

Build = Callable[[beam.Pipeline], Any]
IN_PROCESS = "FnApiRunner"
# Beam knows its other runners by their short names.
_DASK = "DaskRunner", "apache_beam.runners.dask.dask_runner.DaskRunner"
# What Beam adds to a message, and the exception's name that it puts before some.
_ADDED = re.compile(r"\s*\[while running .*", re.DOTALL)
_NAMED = re.compile(r"(?:ValueError|RuntimeError|FileNotFoundError): ")


def run_pipeline(build: Build, *, runner: str, options: Sequence[str]) -> None:
    """Build and run a pipeline to its end. WorkerError with the worker's own message.

    `options` are Beam's, with or without the leading dashes.
    """
    # On our own command line and in a config file they would be flags of ours.
    options = [o if o.startswith("--") else f"--{o}" for o in options]
    if runner in _DASK and not any(o.startswith(("--dask_np", "--dask_pa")) for o in options):
        # Beam's default makes one task of 128 units.
        options = [*options, "--dask_partition_size=1"]
    try:
        pipeline = beam.Pipeline(_engine(runner), PipelineOptions(list(options)))
        build(pipeline)
        _finish(pipeline)
    except Exception as error:
        # Ctrl-C reaches an in-process worker first and comes back as an error like any other.
        if "KeyboardInterrupt" in str(error):
            raise KeyboardInterrupt from error
        # Beam raises the worker's own type where it can and RuntimeError where it cannot.
        if "[while running " not in str(error):
            raise
        raise WorkerError(_as_meant(str(error))) from error


def _as_meant(text: str) -> str:
    """The worker's message alone."""
    message, traceback, _ = text.partition("Traceback (most recent call last)")
    if traceback and not message.strip():
        # From another process the traceback comes first, then its last line and the message.
        message = text.rsplit('\n  File "', 1)[-1]
        message = re.split(r"\n(?! )", message, maxsplit=1)[-1]
    return _NAMED.sub("", _ADDED.sub("", message).strip(), count=1)


def _engine(runner: str) -> PipelineRunner:
    if runner != IN_PROCESS:
        return create_runner(_DASK[1] if runner in _DASK else runner)
    # DirectRunner would try to download another engine first: what runs must not depend on
    # the network, so the in-process engine is named.
    return FnApiRunner()


def _finish(pipeline: beam.Pipeline) -> None:
    result = pipeline.run()
    try:
        result.wait_until_finish()
    finally:
        # Of Dask: a job is several pipelines, and each would leave its connection (and, if
        # no scheduler was named, a cluster of its own) behind.
        if client := getattr(result, "client", None):
            client.close()
