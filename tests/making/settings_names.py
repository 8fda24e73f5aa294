"""The names of all settings of all commands, as documents may write them."""

import dataclasses
import importlib
import types
import typing
from functools import cache

from decant.command_line.checks import Command


@cache
def setting_names() -> frozenset[str]:
    """Such as `corpus.heldout`, `loss.hidden`, `loss.hidden.0.weight` and `output`."""
    for module in ("pipelines.commands", "trainer.config", "trainer.results.sweep"):
        importlib.import_module(f"decant.{module}")
    return frozenset(name for command in _below(Command) for name in _names(command))


def _below(kind: type) -> list[type]:
    return [kind for child in kind.__subclasses__() for kind in (child, *_below(child))]


def _names(settings: type, prefix: str = "") -> list[str]:
    names = []
    hints = typing.get_type_hints(settings, include_extras=False)
    for field in dataclasses.fields(settings):
        name = prefix + field.name
        names.append(name)
        for kind in _dataclasses_in(hints[field.name]):
            names += _names(kind, f"{name}.")
            if typing.get_origin(hints[field.name]) is tuple:
                names += _names(kind, f"{name}.0.")
    return names


def _dataclasses_in(hint: typing.Any) -> list[type]:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    if typing.get_origin(hint) in (tuple, typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _dataclasses_in(part)]
    return []
