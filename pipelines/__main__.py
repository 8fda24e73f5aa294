"""`python -m decant.pipelines COMMAND …`: run a command that makes, checks or changes caches."""

import logging
import signal
import sys
from collections.abc import Callable, Mapping

from decant.command_line.closed_output import exit_with, is_left_by_reader
from decant.command_line.menu import CACHES, menu, unknown
from decant.foreign import tell
from decant.pipelines.commands import COMMANDS
from decant.pipelines.stopping import stopping

Run = Callable[[list[str]], int]


def main(arguments: list[str], commands: Mapping[str, Run] = COMMANDS) -> int:
    """Run a command and return its exit status; a user's mistakes are told without a traceback."""
    if not arguments or arguments[0] not in commands:
        asked = arguments[0] if arguments else ""
        text = menu({"Commands": CACHES})
        if asked in ("-h", "--help"):
            tell(text)
            return 0
        tell(unknown(asked, CACHES) if asked else text, file=sys.stderr)
        return 2
    # Beam logs a worker's error as its own traceback, and names every optional cloud that is not
    # installed. We print the error once, below.
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    stopped_by: list[int] = []
    try:
        with stopping(stopped_by):
            return commands[arguments[0]](arguments[1:])
    except (ValueError, OSError, RuntimeError) as error:
        if is_left_by_reader(error):
            raise  # `exit_with` then ends quietly
        tell(f"error: {error}", file=sys.stderr)
        if "No space left" in str(error):
            tell("Free some space and run again: committed units stay.", file=sys.stderr)
        return 1
    except MemoryError as error:
        tell(f"error: not enough memory. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        done = f": {stop}" if str(stop) else ""
        tell(f"\nstopped{done}; run the same command again to go on from here", file=sys.stderr)
        return 128 + (stopped_by or [signal.SIGINT])[0]


if __name__ == "__main__":
    exit_with(main)
