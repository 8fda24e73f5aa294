"""The values of a command's settings, checked when the settings are made, whoever makes them.

A number's bounds stand in its type, as in `k: Annotated[int, Bounds(1, 4096)]`; of a tuple they
hold for each number. `--help` shows them. `Command` is the base of every command's dataclass, so no
command ever gets a value out of bounds, neither from a file or a flag nor from Python.
"""

import dataclasses
import math
import numbers
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from decant.command_line.local_paths import require_possible_paths
from decant.command_line.python_values import settle

TABLE = {"table": True}
"""Metadata of a field of `name=value` texts, which a file may give as a table."""
_LOWEST, _HIGHEST = -(2**63), 2**63 - 1


@dataclass(frozen=True)
class Bounds:
    """What a number may be. NaN and infinities are never within bounds."""

    least: int | float = _LOWEST
    most: int | float = _HIGHEST
    above: int | float = -math.inf
    """The number is larger than this."""
    below: int | float = math.inf
    """The number is less than this."""

    def __contains__(self, value: Any) -> bool:
        """Whether `value` is within these bounds."""
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        """The bounds in words: `1 to 4,096`, `above 0`, `0 or more`."""
        if self.least != _LOWEST and self.most != _HIGHEST:
            return f"{self.least:,} to {self.most:,}"
        sides = [
            f"{self.least:,} or more" if self.least != _LOWEST else "",
            f"above {self.above:,}" if self.above != -math.inf else "",
            f"at most {self.most:,}" if self.most != _HIGHEST else "",
            f"below {self.below:,}" if self.below != math.inf else "",
        ]
        return ", ".join(filter(None, sides)) or "any finite number"


ANY = Bounds()
"""Any number that 64 bits can hold; said of a field for which every number means something."""
COUNT = Bounds(1)
DEVICES = Bounds(1, 65_536)


class Setting(NamedTuple):
    """One value of a command's settings."""

    name: str
    """As files and messages write it: `corpus.heldout`, `loss.hidden[0].weight`."""
    hint: Any
    """Its declared type, with annotations."""
    value: Any


@dataclass(frozen=True)
class Command:
    """The settings of a command. Making them checks every value: ValueError names the setting."""

    def __post_init__(self) -> None:
        """Check all values, nested ones too. Plainer forms are taken: see `python_values.py`."""
        settle(self)
        require_possible_paths(self)
        check_values(self)


def check_values(settings: Any) -> None:
    """ValueError that names the first value of a dataclass which its field does not allow."""
    for setting in walk(settings):
        check_number(setting)
        check_type(setting)


def walk(settings: Any, *, prefix: str = "") -> Iterator[Setting]:
    """Every value of a dataclass, and of the dataclasses in it and in its lists and dicts."""
    for name, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        yield from _walk_value(prefix + name, hint, getattr(settings, name))


def _walk_value(name: str, hint: Any, value: Any) -> Iterator[Setting]:
    if dataclasses.is_dataclass(value):
        yield from walk(value, prefix=f"{name}.")
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _walk_value(f"{name}.{key}", Any, entry)
    elif isinstance(value, list | tuple) and any(map(dataclasses.is_dataclass, value)):
        for number, entry in enumerate(value):
            yield from _walk_value(f"{name}[{number}]", Any, entry)
    else:
        yield Setting(name, hint, value)


def check_number(setting: Setting) -> None:
    """ValueError for a number out of its field's bounds, or something else in a number's place."""
    bounds = bounds_of(setting.hint)
    if bounds is None or _is_word(setting.value, setting.hint):
        return
    kind = numbers.Real if float in _types(setting.hint) else numbers.Integral
    many = isinstance(setting.value, list | tuple)
    for value in setting.value if many else (setting.value,):
        right = isinstance(value, kind) and not isinstance(value, bool)
        if not right or value not in bounds:
            noun = "a number" if kind is numbers.Real else "a whole number"
            raise ValueError(f"{setting.name} is {value!r}; expected {noun}, {bounds}")


def check_type(setting: Setting) -> None:
    """ValueError for a value of another type than its field's, or a word that the field lacks."""
    choices = _types(setting.hint) - {Any, Ellipsis}
    if not choices or bounds_of(setting.hint):
        return  # anything is allowed, or `check_number` has checked it
    words = [choice for choice in choices if not isinstance(choice, type)]
    classes = tuple(choice for choice in choices if isinstance(choice, type))
    many = isinstance(setting.value, list | tuple)
    for value in setting.value if many else (setting.value,):
        if value not in words and not isinstance(value, classes):
            named = (kind.__name__ for kind in classes if kind is not type(None))
            names = [*map(repr, words), *named]
            raise ValueError(f"{setting.name} is {value!r}; expected {' or '.join(sorted(names))}")


def bounds_of(hint: Any) -> Bounds | None:
    """The bounds in a field's type; None if it has none."""
    if get_origin(hint) is not Annotated:
        return None
    return next((extra for extra in hint.__metadata__ if isinstance(extra, Bounds)), None)


def _is_word(value: Any, hint: Any) -> bool:
    """Whether the value is None, or a word such as `auto`, that may stand for the number."""
    if value is None:
        return type(None) in _types(hint)
    return isinstance(value, str) and value in _types(hint)


def _types(hint: Any) -> set[Any]:
    """The classes and the words of a type: {int, "auto", NoneType} of `int | "auto" | None`."""
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    if get_origin(hint) is Annotated:
        return _types(hint.__origin__)
    inside = get_args(hint)
    return set().union(*map(_types, inside)) if inside else {hint}
