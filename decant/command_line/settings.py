"""Settings of a command: a TOML file, flattened to flags, overridden by flags, parsed once.

Every command uses it. `--corpus.sequence-length 1024` and `[corpus] sequence_length = 1024` mean
the same, and a typo in either gets the same suggestion. A field that is a tuple of dataclasses is a
list of tables: the first `[[loss.hidden]]` of the file is `--loss.hidden.0` on the command line,
which can change that entry or add the next one.
"""

import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from decant.command_line.arguments import Arguments, refuse, sorted_arguments
from decant.command_line.config_file import Settings, merged, read_settings
from decant.command_line.config_paths import require_there
from decant.command_line.fields import Field, element_of, fields_of, is_group
from decant.command_line.kinds import require_kinds
from decant.command_line.value_types import can_be_single

Config = TypeVar("Config")
SWITCHES = frozenset({"--quiet", "--json"})
"""Flags that decide only what is printed."""


def parse(
    config_type: type[Config],
    arguments: Sequence[str],
    *,
    program: str,
    about: Sequence[str] = (),
    with_file: bool = True,
) -> Config:
    """The settings from `[CONFIG.toml] [ABOUT…] [--flag value …]`; a flag overrides the file.

    `config_type` is a frozen dataclass; `program` is the command's name in `--help`. `about` names
    the fields that may be given without their flag, such as the run that `decant evaluate RUN`
    judges. `with_file`: whether the command takes a config file. Paths in a config file are
    relative to the file, other paths to the working directory.

    Raises ValueError for an unknown key in the file (suggesting the nearest name), a value of
    another type than its field's, a number out of its bounds or a path that is not on this machine;
    FileNotFoundError if there is no such file, or if a path in it leads nowhere. A wrong flag ends
    the process with one line and exit status 2, and `--help` with the help and status 0.
    """
    given = sorted_arguments(
        config_type, arguments, program=program, about=about, with_file=with_file
    )
    if given.help:
        _help(config_type, program, about, with_file)
    _require_all(config_type, given, program)
    files = [read_settings(config_type, given.config)] if given.config else []
    return parse_settings(config_type, files, given.flags, program=program)


def parse_settings(
    config_type: type[Config],
    files: Sequence[Settings],
    flags: Sequence[str] = (),
    *,
    program: str,
) -> Config:
    """As `parse`, from what was read of files. Later ones override earlier ones; flags, all."""
    from decant.command_line.parser import run_parser  # reading a cache must not import tyro

    settings = Settings()
    for later in files:
        settings = merged(settings, later)
    changes = _defaults(config_type, settings.table, flags, prefix="")
    default = {"default": config_type(**changes)} if changes else {}
    flags = [*_flatten(settings.table, config_type, prefix=""), *flags]
    parsed = run_parser(config_type, flags, program=program, **default)
    require_there(parsed, settings.missing)
    require_kinds(parsed)
    return parsed


def _help(config_type: type, program: str, about: Sequence[str], with_file: bool) -> None:
    from decant.command_line.help_page import help_page

    print(help_page(config_type, program=program, about=about, with_file=with_file))
    raise SystemExit(0)


def _require_all(config_type: type, given: Arguments, program: str) -> None:
    """End the process if a field without a default is neither in the flags nor in a file."""
    if given.config:
        return
    there = {flag.partition("=")[0] for flag in given.flags}
    for name, one in fields_of(config_type).items():
        option = "--" + name.replace("_", "-")
        if one.is_required and option not in there:
            refuse(program, f"{name.upper()} is missing")


def _flatten(table: Mapping[str, Any], config_type: type, *, prefix: str) -> Iterator[str]:
    fields = fields_of(config_type)
    for name, value in table.items():
        one = fields[name]
        if element := element_of(one.kind):
            for number, entry in enumerate(value):
                yield from _flatten(entry, element, prefix=f"{prefix}{name}.{number}.")
        elif isinstance(value, dict) and one.is_table:
            items = [f"{item}={json.dumps(of, ensure_ascii=False)}" for item, of in value.items()]
            yield from _flag(prefix + name, items)
        elif is_group(one.kind):
            yield from _flatten(value, one.kind, prefix=f"{prefix}{name}.")
        elif isinstance(value, bool) and bool in typing.get_args(one.kind):
            yield from _flag(prefix + name, str(value))  # it may be unset too, so it has no `no-`
        elif not _has_no_flag(value, one):
            yield from _flag(prefix + name, value)


def _has_no_flag(value: Any, one: Field) -> bool:
    """Whether no flag means this value: `layers = [3]`, block 3, where `--layers 3` is a count."""
    return isinstance(value, list) and len(value) == 1 and can_be_single(one.kind)


def _defaults(
    config_type: type, table: Mapping[str, Any], flags: Sequence[str], *, prefix: str
) -> dict[str, Any]:
    """Default values for what the file says and no flag can say.

    They have as many entries in each list of tables as the file or the flags mention, because tyro
    offers flags only for entries that exist in the default value.
    """
    changes: dict[str, Any] = {}
    for name, one in fields_of(config_type).items():
        option = f"{prefix}{name}".replace("_", "-")
        if element := element_of(one.kind):
            entries = [*table.get(name, ())]
            while any(flag.startswith(f"--{option}.{len(entries)}.") for flag in flags):
                entries.append({})
            if entries:
                changes[name] = tuple(
                    element(**_defaults(element, entry, flags, prefix=f"{prefix}{name}.{number}."))
                    for number, entry in enumerate(entries)
                )
        elif is_group(one.kind):
            inside = _defaults(one.kind, table.get(name, {}), flags, prefix=f"{prefix}{name}.")
            if inside:
                changes[name] = one.kind(**inside)
        elif _has_no_flag(table.get(name), one):
            changes[name] = tuple(table[name])
    return changes


def _flag(name: str, value: Any) -> Iterator[str]:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        *tables, last = option.split(".")
        yield "--" + ".".join([*tables, last if value else f"no-{last}"])
    elif isinstance(value, list):
        yield f"--{option}"
        yield from map(str, value)
    else:
        yield f"--{option}={value}"
