"""A command's arguments, told apart: a config file, what the command is about, and flags.

`decant evaluate runs/a --table` and `decant evaluate --table --run runs/a` mean the same. Flags are
checked here by name and value, so that every mistake is told in one line.
"""

import difflib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from decant.command_line.fields import Field, field_of, options_of
from decant.command_line.kinds import kind_of, wrong_kind
from decant.command_line.local_paths import holds_paths, without_tilde
from decant.command_line.value_types import can_mean, words
from decant.foreign import tell

_NEAR = 3
"""Flags that an error suggests at most."""


@dataclass(frozen=True)
class Arguments:
    """Arguments in their kinds."""

    flags: list[str]
    """As tyro takes them; of what is given without a flag, too."""
    config: Path | None = None
    help: bool = False


def sorted_arguments(
    config_type: type,
    arguments: Sequence[str],
    *,
    program: str,
    about: Sequence[str] = (),
    with_file: bool = True,
) -> Arguments:
    """The arguments by kind.

    `about` names the fields that words without a flag give, in this order; a list takes all that
    follow. `with_file`: a word that ends in `.toml`, or names a file, is the config file. A mistake
    ends the process with one line and exit status 2.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        return Arguments([], help=True)
    pairs = list(_flags_and_words(config_type, arguments, program))
    flags = [part for flag, values in pairs if flag for part in _for_tyro(flag, values)]
    given = {flag.partition("=")[0].removeprefix("--") for flag, _ in pairs if flag}
    loose = [word for flag, values in pairs if not flag for word in values]
    configs = [word for word in loose if with_file and _is_config(word, about)]
    if len(configs) > 1:
        refuse(
            program,
            f"two config files, {configs[0]} and {configs[1]}: the command takes one. Put the "
            "settings in one file, or give the few that differ as flags",
        )
    if configs and Path(configs[0]).is_dir():
        refuse(program, _no_config(Path(configs[0])))
    things = [word for word in loose if word not in configs]
    flags += _about(config_type, things, about, given, program)
    return Arguments(flags, Path(configs[0]) if configs else None)


def refuse(program: str, message: str) -> NoReturn:
    """End the process: the command line itself is wrong."""
    end = "" if message.endswith("?") else "."
    tell(f"error: {message}{end} `{program} --help` tells more", file=sys.stderr)
    raise SystemExit(2)


def _flags_and_words(
    config_type: type, arguments: Sequence[str], program: str
) -> Iterator[tuple[str, list[str]]]:
    """(flag, values); the flag is empty for a word that belongs to none."""
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            yield "", [word]
            continue
        option, equals, value = word.removeprefix("--").partition("=")
        one = field_of(config_type, option)
        if one is None:
            refuse(program, _unknown(config_type, option))
        values = [value] if equals else []
        most = 0 if one.kind is bool or equals else len(rest) if one.is_list else 1
        while rest and len(values) < most and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        _require_values(one, option, values, program)
        if holds_paths(one.kind, one.metadata):
            values = [without_tilde(value) for value in values]
        yield f"--{option.replace('_', '-')}", values


def _require_values(one: Field, option: str, values: Sequence[str], program: str) -> None:
    if one.kind is bool and values:
        refuse(program, f"--{option} takes no value; to turn it off: {_negated(option)}")
    if one.kind is not bool and not values and (one.is_required or not one.is_list):
        refuse(program, f"--{option} needs a value: {words(one.kind)}")
    for value in values:
        if not can_mean(value, one.kind):
            refuse(program, f"--{option} is {value!r}; expected {words(one.kind)}")


def _negated(option: str) -> str:
    *tables, last = option.split(".")
    return "--" + ".".join([*tables, f"no-{last}"])


def _for_tyro(flag: str, values: Sequence[str]) -> Iterator[str]:
    # `=` so that a value may begin with a dash.
    yield from [f"{flag}={values[0]}"] if len(values) == 1 else [flag, *values]


def _unknown(config_type: type, option: str) -> str:
    known = {name: name.rpartition(".")[2] for name, _ in options_of(config_type)}
    asked = option.replace("_", "-")
    last = asked.rpartition(".")[2]
    near = [name for name, short in known.items() if short == last]
    near = near or difflib.get_close_matches(asked, known, n=1, cutoff=0.8)
    shorts = difflib.get_close_matches(last, known.values(), n=1)
    near = near or [name for name, short in known.items() if short in shorts]
    near = near or difflib.get_close_matches(asked, known, n=1)
    hint = "; did you mean " + " or ".join(f"--{name}" for name in near[:_NEAR])
    return f"there is no flag --{option}" + (f"{hint}?" if near else "")


def _is_config(word: str, about: Sequence[str]) -> bool:
    path = Path(word)
    return path.is_file() or not about or (word.lower().endswith(".toml") and not path.is_dir())


def _no_config(path: Path) -> str:
    if kind_of(path):
        return wrong_kind(path, "config file")
    return f"{path} is a directory, not a config file"


def _about(
    config_type: type,
    things: Sequence[str],
    about: Sequence[str],
    given: set[str],
    program: str,
) -> list[str]:
    """Flags for the things that the command is about."""
    rest, flags = list(things), []
    for name in about:
        option = name.replace("_", "-")
        one = field_of(config_type, option)
        assert one, f"{config_type} has no field {name}"
        count = len(rest) if one.is_list else 1
        values, rest = rest[:count], rest[count:]
        if values and option in given:
            refuse(program, f"{option} is given twice: {values[0]} and with --{option}")
        if values:
            flags += _for_tyro(f"--{option}", [without_tilde(value) for value in values])
    if rest:
        names = " ".join(name.upper() for name in about)
        takes = f"takes {names}" if about else "takes flags only"
        refuse(program, f"unexpected {rest[0]!r}: the command {takes}")
    return flags
