"""A config file as a checked table: names and types are right, paths lead where the file means."""

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decant.command_line.config_paths import ConfigPaths
from decant.command_line.fields import Field, element_of, fields_of, is_group
from decant.command_line.local_paths import holds_paths, require_possible_path
from decant.command_line.value_types import require_type

_TAKEN_FOR_CONFIG = (
    ". A file that is named without a flag is read as the command's config file; if it is "
    "something else, name it behind its flag"
)


@dataclass(frozen=True)
class Settings:
    """Checked settings of a file, names with underscores; not yet those of a command."""

    table: dict[str, Any] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    """By path that leads nowhere: the error of a command that would read it."""


def read_table(path: Path) -> dict[str, Any]:
    """The table in a TOML file. FileNotFoundError if it is missing, ValueError if it is invalid."""
    require_possible_path(path, name="the config file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file (from {Path.cwd()})")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = "" if path.suffix.lower() == ".toml" else _TAKEN_FOR_CONFIG
        raise ValueError(f"{path}: not valid TOML: {error}{hint}") from None


def read_settings(config_type: type, path: Path) -> Settings:
    """The settings in a file. Raises as `read_table` and `checked` do."""
    return checked(config_type, read_table(path), path=path)


def checked(config_type: type, table: Mapping[str, Any], *, path: Path) -> Settings:
    """The settings in a table of the file `path`, with paths for the working directory.

    ValueError for an unknown key (suggesting the nearest name) or a value of another type.
    """
    paths = ConfigPaths(path)
    return Settings(_checked(config_type, table, "", paths), paths.missing)


def merged(under: Settings, over: Settings) -> Settings:
    """`under` updated with `over`, nested tables recursively."""
    return Settings(_merged(under.table, over.table), {**under.missing, **over.missing})


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        name: _merged(under[name], value)
        for name, value in over.items()
        if isinstance(value, dict) and isinstance(under.get(name), dict)
    }
    return {**under, **over, **both}


def _checked(
    config_type: type, table: Mapping[str, Any], prefix: str, paths: ConfigPaths
) -> dict[str, Any]:
    fields = fields_of(config_type)
    made = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(fields)}"
            raise ValueError(f"{paths.file}: unknown key {prefix}{key}; {hint}")
        made[name] = _value(fields[name], value, prefix + key, paths)
    return made


def _value(one: Field, value: Any, shown: str, paths: ConfigPaths) -> Any:
    where = f"{paths.file}: {shown}"
    tables = isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
    if element := element_of(one.kind):
        if not tables:
            raise ValueError(f"{where} is a list of tables: write [[{shown}]]")
        return [
            _checked(element, entry, f"{shown}[{number}].", paths)
            for number, entry in enumerate(value)
        ]
    if isinstance(value, dict) and one.is_table:
        return _named_values(value, where)
    if isinstance(value, dict) and is_group(one.kind):
        return _checked(one.kind, value, f"{shown}.", paths)
    if isinstance(value, dict):
        raise ValueError(f"{where} is a single value, not a table")
    if tables and value:
        raise ValueError(f"{where} is not a list of tables")
    require_type(value, one.kind, where=where)
    _require_no_flag(value, where)
    if holds_paths(one.kind, one.metadata):
        return paths.located(value, setting=shown, metadata=one.metadata)
    return value


def _named_values(table: dict[str, Any], where: str) -> dict[str, Any]:
    """A table of a `TABLE` field: ValueError for a value that JSON cannot hold, such as a date."""
    try:
        json.dumps(table)
    except TypeError as error:
        raise ValueError(f"{where}: {error}; write it as a string") from None
    return table


def _require_no_flag(value: Any, where: str) -> None:
    for item in value if isinstance(value, list) else ():
        if isinstance(item, str) and item.startswith("--"):
            raise ValueError(f"{where} has {item!r}: write it without the dashes")
