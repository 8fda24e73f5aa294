"""Reading the fields of a model's config, so that none is overlooked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from decant.models.config import MOST
from decant.models.families.harmless import is_harmless


@dataclasses.dataclass(frozen=True)
class FieldReader:
    """Reads a config's fields one by one; `finish` refuses the fields that were never read.

    A field that we do not know may change the function that the weights compute. Ignoring it
    would silently run another model than the one that was trained. Every method raises ValueError
    with the field's name and value.
    """

    where: str
    """The config's name in error messages, such as "config.json"."""
    fields: Mapping[str, Any]
    taken: set[str] = dataclasses.field(default_factory=set)
    """Names of the fields read so far."""

    def take(self, name: str, default: Any = ...) -> Any:
        """The field's value, or `default` if it is absent or null.

        ValueError if there is neither a value nor a default.
        """
        self.taken.add(name)
        value = self.fields.get(name)
        if value is None:
            if default is ...:
                raise ValueError(f"{self.where}: field {name!r} is missing.")
            return default
        return value

    def size(self, name: str, default: Any = ..., *, of: str) -> int:
        """A whole number from 1 to the largest that ModelConfig's field `of` may have."""
        value = self.take(name, default)
        if type(value) is not int or not 1 <= value <= MOST[of]:
            raise self.error(name, value, f"expected a whole number from 1 to {MOST[of]:,}")
        return value

    def window(self, name: str, default: int | None) -> int | None:
        """A number of positions; None if the field is null, `default` only if it is absent."""
        return self.size_or_null(name, default, of="windows")

    def size_or_null(self, name: str, default: Any, *, of: str) -> int | None:
        """As `size`, or None if the field is null; `default` only if it is absent."""
        self.taken.add(name)
        absent_or_null = self.fields.get(name, default) is None
        return None if absent_or_null else self.size(name, default, of=of)

    def number(self, name: str, default: Any = ...) -> int | float:
        """A number from 1e-30 to 1e30, as the file spells it: ids tell 30 from 30.0."""
        value = self.take(name, default)
        if type(value) not in (int, float) or not 1e-30 <= value <= 1e30:
            raise self.error(name, value, "expected a number from 1e-30 to 1e30")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of 1 to 4,096 numbers, each as `number` takes it."""
        value = self.take(name)
        if not isinstance(value, list) or not 1 <= len(value) <= MOST["head_dim"]:
            raise self.error(name, value, f"expected a list of up to {MOST['head_dim']:,} numbers")
        each = FieldReader(f"{self.where}: {name}", {str(i): v for i, v in enumerate(value)})
        return tuple(float(each.number(i)) for i in each.fields)

    def cap(self, name: str, default: float | None) -> int | float | None:
        """A soft cap; None if the field is null, `default` only if it is absent."""
        self.taken.add(name)
        absent_or_null = self.fields.get(name, default) is None
        return None if absent_or_null else self.number(name, default)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.take(name, default)
        if type(value) is not bool:
            raise self.error(name, value, "expected true or false")
        return value

    def section(self, name: str) -> FieldReader:
        """A reader of the object in a field, which is empty if the field is absent or null."""
        value = self.take(name, {})
        if not isinstance(value, Mapping):
            raise self.error(name, value, "expected an object")
        return FieldReader(f"{self.where}: {name}", value)

    def require(self, name: str, *allowed: Any) -> None:
        """Raise ValueError unless the field is absent, null or one of the `allowed` values."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{self.where}: {name} = {shown(value)} is not supported (only "
                f"{' or '.join(map(repr, allowed))}); running without it would compute "
                "another function than the one trained."
            )

    def ignore(self, *names: str) -> None:
        """Accept fields that do not change this family's function, whatever their values."""
        self.taken.update(names)

    def error(self, name: str, value: Any, expected: str) -> ValueError:
        """The error about one field."""
        return ValueError(f"{self.where}: {name} = {shown(value)}; {expected}.")

    def finish(self) -> None:
        """Raise ValueError if there are fields that were not read and may change the function."""
        unknown = [
            f"{name} = {shown(value)}"
            for name, value in sorted(self.fields.items())
            if name not in self.taken and not is_harmless(name, value)
        ]
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise ValueError(
                f"{self.where}: unknown field(s) {', '.join(unknown[:5])}{more}, which may change "
                "the function. If they do not, remove them from the file or list them in "
                "models/families/harmless.py."
            )


def shown(value: Any) -> str:
    """A value from a file, cut to fit a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
