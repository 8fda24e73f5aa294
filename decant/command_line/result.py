"""A command's result: printed for people, as one line (`--quiet`), or as JSON (`--json`).

The result goes to standard output; progress, notices and errors go to standard error.
"""

import json
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decant.command_line.checks import Command
from decant.foreign import tell, terminal

if TYPE_CHECKING:
    from rich.console import Console

_FILE_WIDTH = 200
"""Columns of tables that are written to a file or a pipe."""


@dataclass(frozen=True)
class LongCommand(Command):
    """The settings of a command that may run for long: how much it prints."""

    quiet: bool = field(default=False, kw_only=True)
    """Print only errors and one line with the result."""
    json: bool = field(default=False, kw_only=True)
    """Print the result as one JSON object on standard output, and nothing else there."""


@dataclass(frozen=True)
class Result:
    """What a command made or found."""

    line: str
    """One line: what was made, and where."""
    document: Mapping[str, Any]
    """The object that `--json` prints. Paths become text; NaN and infinities become null."""
    details: Callable[["Console"], None] | None = None
    """Prints, before the line, what people want to see besides."""
    next: Sequence[Sequence[str | Path]] = ()
    """Commands to type next, each as its words."""
    status: int = 0
    """The exit status."""


def show(result: Result, settings: LongCommand) -> int:
    """Print the result as the settings ask; returns the exit status."""
    if settings.json:
        tell(json.dumps(_finite(result.document), indent=1, ensure_ascii=False))
        return result.status
    if result.details and not settings.quiet:
        width = None if sys.stdout.isatty() else _FILE_WIDTH
        result.details(terminal(width=width, soft_wrap=True, highlight=False))
    tell(result.line)
    if not settings.quiet:
        for number, words in enumerate(result.next):
            tell("      " if number else "next: ", shlex.join(map(str, words)), sep="")
    return result.status


def _finite(value: Any) -> Any:
    """The value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
