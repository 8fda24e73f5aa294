"""Runs a command of a process whose reader may leave early, as in `decant inspect CACHE | head`."""

import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

STATUS = 128 + signal.SIGPIPE
"""Exit status if the reader left: what a shell tells of tools that the signal ends."""


def exit_with(main: Callable[[list[str]], int]) -> NoReturn:
    """Exit with the status of `main(arguments)`; quietly with `STATUS` if the reader left."""
    try:
        try:
            status = main(sys.argv[1:])
        finally:
            sys.stdout.flush()  # here and not at Python's exit, which could only print the error
    except (BrokenPipeError, SystemExit) as error:
        if not is_left_by_reader(error):
            raise
        status = STATUS
        _discard_output()
    sys.exit(status)


def is_left_by_reader(error: BaseException) -> bool:
    """Whether the error means that nobody reads standard output any more.

    rich turns it into a SystemExit. A broken pipe to another process is an error as any other.
    """
    if isinstance(error, SystemExit):
        return isinstance(error.__context__, BrokenPipeError)
    if not isinstance(error, BrokenPipeError):
        return False
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)
    except OSError:
        return False  # standard output is no file, as in a notebook
    return bool(poll.poll(0))


def _discard_output() -> None:
    """Connect standard output to nothing: what is left in its buffer cannot be written."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)
