"""The error of a step that failed on a worker."""


class WorkerError(RuntimeError):
    """A step failed on a worker; the message is the worker's."""
