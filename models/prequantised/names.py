"""Lists of modules' names and patterns in quantization_config."""

from __future__ import annotations

import re

from decant.models.families.field_reader import FieldReader

_LONGEST = 500
_MOST_REPEATS = 6
"""A pattern with more of them, or with a repeated group, could take very long to match."""


def read_names(reader: FieldReader, field: str, *, prefix: str = "") -> tuple[str, ...]:
    """A list of names; those that begin with `prefix` are regular expressions.

    ValueError for another value, and for an expression that is invalid or could take very long.
    """
    names = reader.take(field, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise reader.error(field, names, "expected a list of names")
    for name in names:
        if name.startswith(prefix):
            pattern = name.removeprefix(prefix)
            repeats = len(re.findall(r"[*+{]", pattern))
            if len(pattern) > _LONGEST or repeats > _MOST_REPEATS or re.search(r"\)[*+{]", pattern):
                raise reader.error(field, name, "expected a shorter pattern without nested repeats")
            try:
                re.compile(pattern)
            except re.error as error:
                raise reader.error(field, name, f"not an expression: {error}") from None
    return tuple(names)
