"""Settings made in Python may be written as in a file: text for a path, a list, a dict for a table.

`TrainConfig(run="runs/a", data={"steps": 100})` then means what the file says with
`run = "runs/a"` and `[data] steps = 100`.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def settle(settings: Any) -> None:
    """Give every field of a dataclass, and of the dataclasses in it, a value of its own type."""
    for field in dataclasses.fields(settings):
        value = _of_field(field, getattr(settings, field.name), type(settings))
        # Frozen for everybody else; this is a part of making it.
        object.__setattr__(settings, field.name, value)


def override(settings: Any, changes: Mapping[str, Any]) -> Any:
    """The dataclass with other values; a dict changes some values of the dataclass in its place.

    ValueError for a name that is no setting, with the nearest one that is.
    """
    fields, new = {field.name: field for field in dataclasses.fields(settings)}, {}
    for name, value in changes.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(fields)}"
            raise ValueError(f"{type(settings).__name__} has no setting {name!r}; {hint}")
        old = getattr(settings, name)
        nested = isinstance(value, Mapping) and dataclasses.is_dataclass(old)
        own = override(old, value) if nested else value
        new[name] = _of_field(fields[name], own, type(settings))
    return dataclasses.replace(settings, **new)


def _of_field(field: dataclasses.Field, value: Any, of: type) -> Any:
    if "table" in field.metadata and isinstance(value, Mapping):
        value = [f"{key}={json.dumps(one, ensure_ascii=False)}" for key, one in value.items()]
    return _settled(value, typing.get_type_hints(of)[field.name])


def _settled(value: Any, hint: Any) -> Any:
    """The value as the type `hint` has it, if it is a plainer form of it."""
    kinds = _kinds(hint)
    classes: list[Any] = [kind for kind in kinds if isinstance(kind, type)]
    tuples = [kind for kind in kinds if typing.get_origin(kind) is tuple]
    if dataclasses.is_dataclass(value):
        settle(value)
    elif tuples and isinstance(value, list | tuple):
        element = typing.get_args(tuples[0])[0]
        return tuple(_settled(one, element) for one in value)
    elif tuples and len(kinds) == 1:  # as in a file, a single value may stand for a list of one
        return (_settled(value, typing.get_args(tuples[0])[0]),)
    elif isinstance(value, str) and Path in classes and str not in classes:
        return Path(value)
    elif isinstance(value, Mapping):
        nested: list[Any] = [kind for kind in classes if dataclasses.is_dataclass(kind)]
        return override(nested[0](), value) if nested else value
    return value


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)
