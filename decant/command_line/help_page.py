"""The text of `decant COMMAND --help`: what it does, examples, the flags people need, the rest."""

import inspect
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from decant.command_line.docstrings import field_docs
from decant.command_line.fields import Field, element_of, field_of, fields_of, is_group
from decant.command_line.guide import GUIDE, Guide

_WIDEST = 100
"""Longer lines are hard to read, however wide the terminal is."""
_TEXT = " " * 6


def help_page(
    config_type: type, *, program: str, about: Sequence[str] = (), with_file: bool = True
) -> str:
    """The page, as wide as the terminal (80 columns without one). Arguments as of `parse`."""
    width = min(shutil.get_terminal_size((80, 24)).columns, _WIDEST)
    guide = GUIDE.get(program.removeprefix("decant "), Guide())
    lines = [_usage(config_type, program, about, with_file), ""]
    lines += [*_wrapped(inspect.getdoc(config_type) or "", width), ""]
    if guide.examples:
        lines += ["Examples", *_examples(guide, width), ""]
    if about:
        lines += ["Arguments", *_arguments(config_type, about, with_file, width), ""]
    needed = [(f"--{option}", field_of(config_type, option)) for option in guide.flags]
    if needed:
        lines += ["Flags to begin with", *_options(needed, width), ""]
    skip = {*about, *(flag.removeprefix("--") for flag, _ in needed)}
    return "\n".join([*lines, *_sections(config_type, "", skip, width)]).rstrip()


def _usage(config_type: type, program: str, about: Sequence[str], with_file: bool) -> str:
    fields = fields_of(config_type)
    names = [_argument(name, fields[name]) for name in about]
    words = ["[CONFIG.toml]"] if with_file else []
    flags = [
        f"--{name} {_value(one)}"
        for name, one in fields.items()
        if one.is_required and name not in about
    ]
    return " ".join([f"usage: {program}", *words, *names, *flags, "[--flag value …]"])


def _argument(name: str, one: Field) -> str:
    word = name.upper()
    if one.is_list:  # `CACHE…` of `caches`, but `CORPUS…`
        word = (word if word.endswith("US") else word.removesuffix("S")) + "…"
    return word if one.is_required else f"[{word}]"


def _examples(guide: Guide, width: int) -> Iterator[str]:
    for command, meaning in guide.examples:
        yield f"  {command}"
        yield from _wrapped(meaning, width, _TEXT)


def _arguments(
    config_type: type, about: Sequence[str], with_file: bool, width: int
) -> Iterator[str]:
    if with_file:
        yield "  CONFIG.toml"
        yield from _wrapped(
            "Settings, by the names of the flags: `x` under `[data]` is "
            "`--data.x`. Flags win over it.",
            width,
            _TEXT,
        )
    for name in about:
        one = fields_of(config_type)[name]
        yield f"  {_argument(name, one).strip('[]')}, or --{name} {_value(one)}"
        yield from _wrapped(_explained(one), width, _TEXT)


def _sections(config_type: type, prefix: str, skip: set[str], width: int) -> Iterator[str]:
    """The flags that are not among `skip`: those of the class itself first, then its tables."""
    own, inside = [], []
    for name, one in fields_of(config_type).items():
        option = prefix + name.replace("_", "-")
        if element := element_of(one.kind):
            inside.append((f"[[{prefix}{name}]]", f"{option}.0.", element, field_docs(config_type)))
        elif is_group(one.kind):
            inside.append((f"{prefix}{name}", f"{option}.", one.kind, {}))
        elif option not in skip:
            own.append((f"--{option}", one))
    if own and not prefix:
        yield "More flags" if skip else "Flags"
    yield from _options(own, width)
    if own:
        yield ""
    for title, below, kind, docs in inside:
        text = docs.get(title.strip("[]").rpartition(".")[2]) or inspect.getdoc(kind) or ""
        rest = list(_sections(kind, below, skip, width))
        has_own = any(not is_group(one.kind) for one in fields_of(kind).values())
        if rest and has_own:
            yield from _wrapped(f"{title}: {text}", width)
        yield from rest


def _options(options: Sequence[tuple[str, Field | None]], width: int) -> Iterator[str]:
    for flag, one in options:
        assert one, f"there is no flag {flag}"
        if one.kind is bool and one.default is True:
            *tables, last = flag.removeprefix("--").split(".")
            yield f"  --{'.'.join([*tables, f'no-{last}'])}"
        else:
            yield f"  {flag} {_value(one)}".rstrip()
        yield from _wrapped(_explained(one), width, _TEXT)


def _explained(one: Field) -> str:
    """The field's docstring, its bounds and its default."""
    notes = [str(one.bounds)] if one.bounds and str(one.bounds) != "any finite number" else []
    if one.is_required:
        notes.append("required")
    elif one.kind is bool:
        notes += ["on by default"] if one.default else []
    elif shown := _default(one.default):
        notes.append(f"default: {shown}")
    text = field_docs(one.owner).get(one.name, "")
    return f"{text} ({'; '.join(notes)})" if notes else text


def _default(value: Any) -> str:
    if value is None or value == ():
        return ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _value(one: Field) -> str:
    """What follows the flag: `PATH`, `cut|checkpoint|scratch`, `INT…`."""
    if one.kind is bool:
        return ""
    if one.is_table:
        return "NAME=VALUE…"
    if "is_path" in one.metadata:
        return "PATH…" if one.is_list else "MODEL" if "is_model" in one.metadata else "PATH"
    return _metavar(one.kind)


def _metavar(kind: Any) -> str:
    inside = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, inside))
    if typing.get_origin(kind) in (tuple, list):
        return f"{_metavar(inside[0])}…"
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return "|".join(dict.fromkeys(_metavar(k) for k in inside if k is not types.NoneType))
    return {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}.get(kind, "VALUE")


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """The text's paragraphs, filled; flags and file names are not broken."""
    lines = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines += [""] if lines else []
        lines += textwrap.wrap(
            " ".join(paragraph.split()),
            width,
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines
