"""Running a Beam pipeline by a named runner, and getting a worker's error back as it was meant."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.runner import create_runner

Build = Callable[[beam.Pipeline], Any]
# The last line of a worker's traceback that names an exception, up to Beam's own addition.
_RAISED = re.compile(r"^(?:[\w.]*\.)?(\w+(?:Error|Exception)): (.*)", re.MULTILINE | re.DOTALL)
_ADDED = re.compile(r"\s*\[while running .*", re.DOTALL)


class WorkerError(Exception):
    """A step failed on a worker; the message is the worker's."""


def run_pipeline(build: Build, *, runner: str, options: Sequence[str]) -> None:
    """Build and run a pipeline to its end. WorkerError with the worker's own message."""
    # DirectRunner would try to download another engine first: what runs must not depend on
    # the network, so the in-process engine is named.
    engine = FnApiRunner() if runner == "FnApiRunner" else create_runner(runner)
    try:
        with beam.Pipeline(runner=engine, options=PipelineOptions(list(options))) as pipeline:
            build(pipeline)
    except RuntimeError as error:
        raise WorkerError(worker_message(str(error))) from error


def worker_message(text: str) -> str:
    """What the worker raised, out of the traceback that Beam sends in its place."""
    raised = list(_RAISED.finditer(text.split("Traceback (most recent call last):")[-1]))
    if not raised:
        return text
    name, message = raised[0].groups()
    message = _ADDED.sub("", message).strip()
    return message if name in ("ValueError", "RuntimeError") else f"{name}: {message}"
