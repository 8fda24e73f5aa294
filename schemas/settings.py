"""A config file is a saved command line: TOML, flattened, overridden by flags, parsed once.

Both packages' command lines come through here, so that `--corpus.sequence-length 1024` and
`[corpus] sequence_length = 1024` are the same thing and a typo gets the same answer.
"""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")


def parse(config_type: type[Config], arguments: Sequence[str], *, program: str) -> Config:
    """Frozen `config_type` from `[CONFIG.toml] [--flag value …]`; flags win over the file.

    Raises ValueError on an unknown key in the file (with the nearest right name) and
    FileNotFoundError when the file does not exist; a wrong flag ends the process with tyro's
    message and exit status 2.
    """
    import tyro  # here, because readers of a cache import schemas and need no command line

    flags = list(arguments)
    if flags and not flags[0].startswith("-"):
        flags = [*_flags_from_file(config_type, Path(flags[0])), *flags[1:]]
    return tyro.cli(config_type, args=flags, prog=program)


def _flags_from_file(config_type: type, path: Path) -> Iterator[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file (from {Path.cwd()})")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    yield from _flatten(table, config_type, prefix="", path=path)


def _flatten(table: dict, config_type: type, *, prefix: str, path: Path) -> Iterator[str]:
    types = typing.get_type_hints(config_type)
    names = {field.name: types[field.name] for field in dataclasses.fields(config_type)}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(names)}"
            raise ValueError(f"{path}: unknown key {prefix}{key}; {hint}")
        if isinstance(value, dict):
            if not dataclasses.is_dataclass(names[name]):
                raise ValueError(f"{path}: {prefix}{key} is a single value, not a table")
            yield from _flatten(value, names[name], prefix=f"{prefix}{name}.", path=path)
        else:
            yield from _flag(prefix + name, value)


def _flag(name: str, value: Any) -> Iterator[str]:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        *tables, last = option.split(".")
        yield "--" + ".".join([*tables, last if value else f"no-{last}"])
    elif isinstance(value, list):
        yield f"--{option}"
        yield from (str(item) for item in value)
    else:
        yield f"--{option}={value}"
