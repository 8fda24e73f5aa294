"""Settings of a command: a TOML file, flattened to flags, overridden by flags, parsed once.

Commands of both packages that take a config file use it. `--corpus.sequence-length 1024` and
`[corpus] sequence_length = 1024` mean the same, and a typo in either gets the same suggestion. A
field that is a tuple of dataclasses is a list of tables: the first `[[loss.hidden]]` of the file is
`--loss.hidden.0` on the command line, which can change that entry or add the next one.
"""

import dataclasses
import difflib
import itertools
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from decant.command_line.checks import TABLE
from decant.command_line.local_paths import require_local

Config = TypeVar("Config")
SWITCHES = frozenset({"--quiet", "--json"})
"""Flags without a value, which may also stand before the config file."""


def parse(config_type: type[Config], arguments: Sequence[str], *, program: str) -> Config:
    """The settings from `[CONFIG.toml] [--flag value …]`; a flag overrides the file.

    `config_type` is a frozen dataclass; `program` is the command's name in `--help`. Raises
    ValueError for an unknown key in the file (suggesting the nearest name), a value of another type
    than its field's, a number out of its bounds or a path that is not on this machine, and
    FileNotFoundError if there is no such file. A wrong flag ends the process with tyro's message
    and exit status 2.
    """
    switches = list(itertools.takewhile(SWITCHES.__contains__, arguments))
    flags = [*arguments[len(switches) :], *switches]
    if not flags or flags[0].startswith("-"):
        return _run_tyro(config_type, {}, flags, program=program)
    path = Path(flags.pop(0))
    return parse_tables(config_type, [read_table(path)], flags, program=program, path=path)


def parse_tables(
    config_type: type[Config],
    tables: Sequence[Mapping[str, Any]],
    flags: Sequence[str] = (),
    *,
    program: str,
    path: Path,
) -> Config:
    """As `parse`, from tables read from `path`. Later tables override earlier ones; flags, all."""
    table: dict[str, Any] = {}
    for later in tables:
        table = _merge_tables(table, later)
    flags = [*_flatten(table, config_type, prefix="", path=path), *flags]
    return _run_tyro(config_type, table, flags, program=program)


def _merge_tables(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`under` updated with `over`, nested tables recursively."""
    merged = {key.replace("-", "_"): value for key, value in under.items()}
    for key, value in over.items():
        name = key.replace("-", "_")
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge_tables(merged[name], value) if both else value
    return merged


def _run_tyro(
    config_type: type[Config], table: dict[str, Any], flags: Sequence[str], *, program: str
) -> Config:
    from decant.command_line.parser import (
        run_parser,  # here, because reading a cache must not import tyro
    )

    changes = _lists_of_tables(config_type, table, flags, prefix="")
    default = {"default": config_type(**changes)} if changes else {}
    return run_parser(config_type, flags, program=program, **default)


def parse_flags(config_type: type[Config], arguments: Sequence[str], *, program: str) -> Config:
    """Frozen `config_type` from arguments and flags alone, for a command without a config file.

    Exits with tyro's message and status 2 if an argument is wrong or missing. ValueError for a path
    that is not on this machine.
    """
    import tyro  # not at the top, as in `_run_tyro`

    from decant.command_line.parser import run_parser

    pairs_off = (tyro.conf.FlagCreatePairsOff,)
    return run_parser(config_type, arguments, program=program, config=pairs_off)


def read_table(path: Path) -> dict[str, Any]:
    """The table in a TOML file. FileNotFoundError if it is missing, ValueError if it is invalid."""
    require_local(str(path), name="the config file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file (from {Path.cwd()})")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None


def _flatten(table: dict, config_type: type, *, prefix: str, path: Path) -> Iterator[str]:
    names, shown = _fields(config_type), _for_messages(prefix)
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {shown}{near[0]}?" if near else f"known: {', '.join(names)}"
            raise ValueError(f"{path}: unknown key {shown}{key}; {hint}")
        element = _element(names[name])
        tables = isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
        if element and tables:
            for number, entry in enumerate(value):
                inside = f"{prefix}{name}.{number}."
                yield from _flatten(entry, element, prefix=inside, path=path)
        elif element:
            raise ValueError(f"{path}: {shown}{key} is a list of tables: write [[{shown}{key}]]")
        elif isinstance(value, dict) and name in _tables(config_type):
            items = [f"{item}={_json(of, path=path)}" for item, of in value.items()]
            yield from _flag(prefix + name, items, path=path)
        elif isinstance(value, dict) and dataclasses.is_dataclass(names[name]):
            yield from _flatten(value, names[name], prefix=f"{prefix}{name}.", path=path)
        elif isinstance(value, dict):
            raise ValueError(f"{path}: {shown}{key} is a single value, not a table")
        elif tables and value:
            raise ValueError(f"{path}: {shown}{key} is not a list of tables")
        else:
            require_type(value, names[name], where=f"{path}: {shown}{key}")
            yield from _flag(prefix + name, value, path=path)


def require_type(value: Any, kind: Any, *, where: str) -> None:
    """ValueError unless a value from a TOML file has the type `kind`; `where` begins the message.

    A flag is always text, so without this check `k = "16"` would mean 16. A single value may stand
    for a list of one, and the text "None" unsets a field, since TOML has no null.
    """
    if not _has_type(value, kind):
        got = f'"{value}", a string' if isinstance(value, str) else _toml(value)
        raise ValueError(f"{where} is {got}; expected {_words(kind)}")


def _has_type(value: Any, kind: Any) -> bool:
    choices = typing.get_args(kind)
    if kind is types.NoneType:
        return value == "None"
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return any(_has_type(value, choice) for choice in choices)
    if typing.get_origin(kind) is Literal:
        return value in choices and type(value) in map(type, choices)
    if typing.get_origin(kind) is tuple:
        values = value if isinstance(value, list) else [value]
        return all(_has_type(one, choices[0]) for one in values)
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_has_type(one, choices[0]) for one in value)
    if kind in _TYPES:
        # A bool is an int in Python, but `k = true` is a mistake.
        return isinstance(value, _TYPES[kind]) and (kind is bool or not isinstance(value, bool))
    return True


_TYPES = {bool: bool, int: int, float: (int, float), str: str, Path: str, dict: dict}
"""Types that a value from TOML may have, by the field's type."""
_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    types.NoneType: '"None"',
    dict: "a table",
}


def _words(kind: Any) -> str:
    """The values that `kind` allows, for a message."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(_toml, choices))
    if typing.get_origin(kind) in (tuple, list):
        return f"a list, each {_words(choices[0])}"
    return " or ".join(map(_words, choices)) if choices else _WORDS.get(kind, "a string")


def _toml(value: Any) -> str:
    """A value about as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _lists_of_tables(
    config_type: type, table: dict, flags: Sequence[str], *, prefix: str
) -> dict[str, Any]:
    """Default values with as many entries in each list of tables as the file or the flags mention.

    tyro offers flags only for entries that exist in the default value.
    """
    changes: dict[str, Any] = {}
    table = {key.replace("-", "_"): value for key, value in table.items()}
    for name, kind in _fields(config_type).items():
        option = f"{prefix}{name}".replace("_", "-")
        if element := _element(kind):
            count = len(table.get(name, ()))
            while any(flag.startswith(f"--{option}.{count}.") for flag in flags):
                count += 1
            if count:
                changes[name] = tuple(element() for _ in range(count))
        elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
            inside = _lists_of_tables(kind, table.get(name, {}), flags, prefix=f"{prefix}{name}.")
            if inside:
                changes[name] = kind(**inside)
    return changes


def _fields(config_type: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    types = typing.get_type_hints(config_type)
    return {field.name: types[field.name] for field in dataclasses.fields(config_type)}


def _tables(config_type: type) -> set[str]:
    """The fields marked with `TABLE`."""
    fields = dataclasses.fields(config_type)
    return {field.name for field in fields if TABLE.items() <= field.metadata.items()}


def _json(value: Any, *, path: Path) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f"{path}: {error}; write it as a string") from None


def _element(kind: Any) -> type | None:
    """The dataclass D if `kind` is tuple[D, …], else None."""
    if typing.get_origin(kind) is not tuple:
        return None
    element = typing.get_args(kind)[0]
    return element if isinstance(element, type) and dataclasses.is_dataclass(element) else None


def _for_messages(prefix: str) -> str:
    """The prefix as messages write it: `loss.hidden[0].` for `loss.hidden.0.`"""
    return re.sub(r"\.(\d+)(?=\.)", r"[\1]", prefix)


def _flag(name: str, value: Any, *, path: Path) -> Iterator[str]:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        *tables, last = option.split(".")
        yield "--" + ".".join([*tables, last if value else f"no-{last}"])
    elif isinstance(value, list):
        yield f"--{option}"
        for item in value:
            if isinstance(item, str) and item.startswith("--"):
                raise ValueError(f"{path}: {name} has {item!r}: write it without the dashes")
            yield str(item)
    else:
        yield f"--{option}={value}"
