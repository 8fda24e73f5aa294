"""What a family of models is to us: how its files spell a config and name each parameter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class TensorName:
    """Where one of our parameters lies in a file, and in which layout.

    Names hold `{layer}` when every block has its own tensor; ours are then stacked.
    """

    hf: str
    gguf: str
    in_axes: int | None = None
    """Leading axes of our parameter (without `layers`) that are a linear map's input; files
    keep such a map as [output, input]. 0: its bias, flat in files. None: kept as it is."""
    rotary: bool = False
    """Llama's GGUF files interleave the two halves of each of these heads."""

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the file of a parameter (of one layer) that has `shape` here."""
        if self.in_axes is None:
            return shape
        output = (math.prod(shape[self.in_axes :]),)
        return (*output, math.prod(shape[: self.in_axes])) if self.in_axes else output

    def from_file(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The file's array as our parameter of one layer."""
        return (array.T if self.in_axes else array).reshape(shape)

    def to_file(self, parameter: np.ndarray) -> np.ndarray:
        """Inverse of `from_file`."""
        shape = self.file_shape(parameter.shape)
        if self.in_axes:
            return np.ascontiguousarray(parameter.reshape(shape[::-1]).T)
        return parameter.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Family:
    """One family: everything that its checkpoints do differently from another's."""

    name: str
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json."""
    gguf_architectures: tuple[str, ...]
    config_from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    config_from_gguf: Callable[[Mapping[str, Any], Collection[str]], ModelConfig]
    """(metadata, names of the file's tensors) → config."""
    tensors: Callable[[ModelConfig], dict[str, TensorName]]
    """Our parameter's path ("blocks.query") → its name in files."""
    gguf_interleaves_rotary: bool
    redundant: tuple[str, ...] = ()
    """Tensors that a file may carry although they follow from the config (regular expressions)."""


@dataclasses.dataclass(frozen=True)
class FieldReader:
    """Reads a config's fields one by one and refuses what is left over.

    A field that we do not know may change the function, so it is an error rather than
    a silent difference from the model that was trained.
    """

    where: str
    fields: Mapping[str, Any]
    taken: set[str] = dataclasses.field(default_factory=set)

    def take(self, name: str, default: Any = ...) -> Any:
        """The field's value; without a default its absence is an error."""
        self.taken.add(name)
        value = self.fields.get(name)
        if value is None:
            if default is ...:
                raise ValueError(f"{self.where}: field {name!r} is missing.")
            return default
        return value

    def require(self, name: str, *allowed: Any) -> None:
        """The field must be absent or have one of the values under which we are exact."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{self.where}: {name} = {value!r} is not supported (only "
                f"{' or '.join(map(repr, allowed))}); running without it would compute "
                "another function than the one trained."
            )

    def ignore(self, *names: str) -> None:
        """These fields do not change the function."""
        self.taken.update(names)

    def finish(self) -> None:
        """Refuse fields that nobody took."""
        unknown = sorted(name for name in self.fields if name not in self.taken)
        if unknown:
            raise ValueError(
                f"{self.where}: unknown field(s) {', '.join(unknown)}, which may change the "
                "function. If they do not, remove them from the file or list them as ignored in "
                "models/families."
            )
