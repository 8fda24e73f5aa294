"""The fields of a settings dataclass: their types, their flags, and which are lists of tables."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from decant.command_line.checks import TABLE, Bounds, bounds_of


@dataclass(frozen=True)
class Field:
    """A field that holds a value, and so has a flag."""

    owner: type
    """The dataclass that it is a field of."""
    name: str
    kind: Any
    """Its type, without `Annotated`."""
    metadata: Mapping[str, Any]
    default: Any
    """`MISSING` if it has to be given."""
    bounds: Bounds | None

    @property
    def is_required(self) -> bool:
        """Whether it has to be given."""
        return self.default is dataclasses.MISSING

    @property
    def is_list(self) -> bool:
        """Whether its flag takes several values."""
        return _is_list(self.kind)

    @property
    def is_table(self) -> bool:
        """Whether it is marked with `TABLE`."""
        return TABLE.items() <= self.metadata.items()


def fields_of(config_type: type) -> dict[str, Field]:
    """The fields of a dataclass by name, nested dataclasses and lists of tables too."""
    types = typing.get_type_hints(config_type)
    hints = typing.get_type_hints(config_type, include_extras=True)
    return {
        one.name: Field(
            config_type,
            one.name,
            types[one.name],
            one.metadata,
            one.default if one.default_factory is dataclasses.MISSING else one.default_factory(),
            bounds_of(hints[one.name]),
        )
        for one in dataclasses.fields(config_type)
    }


def is_group(kind: Any) -> bool:
    """Whether a field of this type is a table with settings of its own."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def element_of(kind: Any) -> type | None:
    """The dataclass D if `kind` is tuple[D, …], a list of tables; else None."""
    if typing.get_origin(kind) is not tuple:
        return None
    element = typing.get_args(kind)[0]
    return element if is_group(element) else None


def options_of(config_type: type, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Every flag without its dashes, such as `corpus.sequence-length`, and its field.

    Of a list of tables, the flags of its first entry.
    """
    for name, one in fields_of(config_type).items():
        option = prefix + name.replace("_", "-")
        if element := element_of(one.kind):
            yield from options_of(element, f"{option}.0.")
        elif is_group(one.kind):
            yield from options_of(one.kind, f"{option}.")
        else:
            yield option, one


def field_of(config_type: type, option: str) -> Field | None:
    """The field that a flag sets, `loss.no-x` the field x; None if there is no such flag."""
    first, _, rest = option.replace("_", "-").partition(".")
    fields = {name.replace("_", "-"): one for name, one in fields_of(config_type).items()}
    one = fields.get(first)
    if one is None:
        negated = fields.get(first.removeprefix("no-"))
        return negated if negated and negated.kind is bool and not rest else None
    if element := element_of(one.kind):
        number, _, rest = rest.partition(".")
        return field_of(element, rest) if number.isdigit() and rest else None
    if is_group(one.kind):
        return field_of(one.kind, rest) if rest else None
    return None if rest else one


def _is_list(kind: Any) -> bool:
    inside = typing.get_args(kind)
    return typing.get_origin(kind) in (tuple, list) or any(map(_is_list, inside))
