"""Whether a value from a file, or a flag's text, has the type of its field."""

import types
import typing
from pathlib import Path
from typing import Any, Literal

_TYPES = {bool: bool, int: int, float: (int, float), str: str, Path: str, dict: dict}
"""Types that a value from TOML may have, by the field's type."""
_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    types.NoneType: '"None"',
    dict: "a table",
}


def require_type(value: Any, kind: Any, *, where: str) -> None:
    """ValueError unless a value from a TOML file has the type `kind`; `where` begins the message.

    A flag is always text, so without this check `k = "16"` would mean 16. A single value may stand
    for a list of one, and the text "None" unsets a field, since TOML has no null.
    """
    if not _has_type(value, kind):
        got = f'"{value}", a string' if isinstance(value, str) else _toml(value)
        raise ValueError(f"{where} is {got}; expected {words(kind)}")


def can_mean(text: str, kind: Any) -> bool:
    """Whether a flag's text can be read as a value of the type `kind`."""
    if kind in (int, float):
        try:
            kind(text)
        except ValueError:
            return False
        return True
    choices = typing.get_args(kind)
    if kind is types.NoneType:
        return text == "None"
    if typing.get_origin(kind) is Literal:
        return text in map(str, choices)
    if typing.get_origin(kind) in (tuple, list):
        return can_mean(text, choices[0])
    return any(can_mean(text, choice) for choice in choices) if choices else True


def can_be_single(kind: Any) -> bool:
    """Whether a value of this type is a list or, with another meaning, one such value: `int |
    tuple[int, …]`."""
    choices = typing.get_args(kind)
    elements = {typing.get_args(one)[0] for one in choices if typing.get_origin(one) is tuple}
    return not elements.isdisjoint(choices)


def words(kind: Any) -> str:
    """The values that `kind` allows, for a message."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(_toml, choices))
    if typing.get_origin(kind) in (tuple, list):
        return f"a list, each {words(choices[0])}"
    return " or ".join(map(words, choices)) if choices else _WORDS.get(kind, "a string")


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


def _toml(value: Any) -> str:
    """A value about as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
