"""The error of a step that failed on a worker, of Beam's or of a process pool."""


class WorkerError(RuntimeError):
    """A step failed on a worker; the message is the worker's."""
