"""Runs tyro with a rule of ours: a value that the settings refuse is our own error.

In a file of its own, because it needs tyro, which reading a cache must not import.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructTypeInfo,
)

from decant.command_line.checks import Command

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class _Refused:
    error: ValueError


def run_parser(
    config_type: type[Config], flags: Sequence[str], *, program: str, **options: Any
) -> Config:
    """The settings that `flags` give; `options` are those of `tyro.cli`.

    ValueError if a `Command` refuses its values. Exits with tyro's message and status 2 if a flag
    is wrong.
    """
    parsed: Any = tyro.cli(config_type, args=flags, prog=program, registry=_rules(), **options)
    if isinstance(parsed, _Refused):
        raise parsed.error
    return parsed


def _rules() -> ConstructorRegistry:
    registry = ConstructorRegistry()
    inside: set[Any] = set()

    @registry.struct_rule
    def dataclass_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type) or info.type in inside:
            return None
        inside.add(info.type)  # so that the next line asks tyro's own rule
        spec = ConstructorRegistry.get_struct_spec(info)
        inside.remove(info.type)
        if not isinstance(spec, StructConstructorSpec):
            return None
        make = _told_later(spec.instantiate) if issubclass(info.type, Command) else spec.instantiate
        return StructConstructorSpec(make, spec.fields)

    return registry


def _told_later(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, with its ValueError as the result: tyro would print it in a box, its lines broken."""

    def made(**values: Any) -> Any:
        try:
            return make(**values)
        except ValueError as error:
            return _Refused(error)

    return made
