"""`decant COMMAND …`: find the command's package and hand it the arguments."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from decant import __version__
from decant.command_line.closed_output import exit_with
from decant.command_line.menu import CACHES, GROUPS, STUDENTS, menu, unknown
from decant.foreign import tell


def main(arguments: Sequence[str]) -> int:
    """Run one command. Returns the exit status: 2 if there is no such command."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    # Imported here: the menu must not wait for tyro, nor a command for the other package.
    if name in CACHES:
        from decant.pipelines.__main__ import main as run_pipelines
        from decant.pipelines.commands import COMMANDS, inspect

        beside = {"inspect": partial(inspect, open_student=_open_student)}
        return run_pipelines([name, *rest], COMMANDS | beside)
    if name in STUDENTS:
        from decant.trainer.__main__ import main as run_trainer

        return run_trainer([name, *rest])
    if name == "--version":
        tell(f"decant {__version__}")
        return 0
    if name in ("-h", "--help"):
        tell(menu(GROUPS))
        return 0
    tell(unknown(name, CACHES | STUDENTS) if name else menu(GROUPS), file=sys.stderr)
    return 2


def _open_student(*run_and_cache: Any, **options: Any) -> Any:
    """For `inspect --run`: `pipelines` shows what `trainer` computes, and imports it nowhere."""
    from decant.trainer.results.beside_teacher import open_student

    return open_student(*run_and_cache, **options)


def run() -> None:
    """The console script `decant`."""
    exit_with(main)


if __name__ == "__main__":
    run()
