"""Running a Beam pipeline by a named runner, and getting a worker's error back as it was meant."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.runner import create_runner

Build = Callable[[beam.Pipeline], Any]
# What Beam adds to a message, and the exception's name that it puts before some.
_ADDED = re.compile(r"\s*\[while running .*", re.DOTALL)
_NAMED = re.compile(r"(?:ValueError|RuntimeError|FileNotFoundError): ")


class WorkerError(RuntimeError):
    """A step failed on a worker; the message is the worker's."""


def run_pipeline(build: Build, *, runner: str, options: Sequence[str]) -> None:
    """Build and run a pipeline to its end. WorkerError with the worker's own message."""
    # DirectRunner would try to download another engine first: what runs must not depend on
    # the network, so the in-process engine is named.
    engine = FnApiRunner() if runner == "FnApiRunner" else create_runner(runner)
    try:
        with beam.Pipeline(runner=engine, options=PipelineOptions(list(options))) as pipeline:
            build(pipeline)
    except Exception as error:
        # Ctrl-C reaches an in-process worker first and comes back as an error like any other.
        if "KeyboardInterrupt" in str(error):
            raise KeyboardInterrupt from error
        # Beam raises the worker's own type where it can and RuntimeError where it cannot.
        if "[while running " not in str(error):
            raise
        message = _ADDED.sub("", str(error).split("Traceback (most recent call last)")[0])
        raise WorkerError(_NAMED.sub("", message.strip(), count=1)) from error
