"""Reading the fields of a model's config, so that none is overlooked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class FieldReader:
    """Reads a config's fields one by one; `finish` refuses the fields that were never read.

    A field that we do not know may change the function that the weights compute. Ignoring it
    would silently run another model than the one that was trained.
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

    def take_nullable(self, name: str, default: Any) -> Any:
        """The field's value, where null means "off" (None); `default` only if it is absent."""
        self.taken.add(name)
        return self.fields.get(name, default)

    def require(self, name: str, *allowed: Any) -> None:
        """Raise ValueError unless the field is absent, null or one of the `allowed` values."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{self.where}: {name} = {value!r} is not supported (only "
                f"{' or '.join(map(repr, allowed))}); running without it would compute "
                "another function than the one trained."
            )

    def ignore(self, *names: str) -> None:
        """Accept fields that do not change the function, whatever their values."""
        self.taken.update(names)

    def finish(self) -> None:
        """Raise ValueError if the config has fields that were neither read nor ignored."""
        unknown = sorted(name for name in self.fields if name not in self.taken)
        if unknown:
            raise ValueError(
                f"{self.where}: unknown field(s) {', '.join(unknown)}, which may change the "
                "function. If they do not, remove them from the file or list them as ignored in "
                "models/families."
            )
