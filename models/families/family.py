"""What a family of models is to us: how its files spell a config and name each parameter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import numpy as np

from decant.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class TensorName:
    """Where one of our parameters lies in a file, and in which layout.

    Names hold `{layer}` when every block has its own tensor, and `{expert}` when every expert has;
    ours are then stacked.
    """

    hf: str
    gguf: str
    """Empty in families that have no GGUF architecture."""
    in_axes: int | None = None
    """Leading axes of our parameter (without `layers`) that are a linear map's input; files
    keep such a map as [output, input]. 0: its bias, flat in files. None: kept as it is."""
    rotary: bool = False
    """Llama's GGUF files interleave the two halves of each of these heads."""
    experts: bool = False
    """Our parameter has an axis of experts; names without `{expert}` are of all of them in one."""

    def stored(
        self, naming: Literal["hf", "gguf"], shape: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """The file's tensors that a parameter of `shape` lies in, and where in it each belongs."""
        pattern = getattr(self, naming)
        axes = [axis for axis in ("layer", "expert") if f"{{{axis}}}" in pattern]
        places = np.ndindex(*shape[: len(axes)])
        return {pattern.format(**dict(zip(axes, at, strict=True))): at for at in places}

    def file_shape(self, shape: tuple[int, ...], naming: Literal["hf", "gguf"]) -> tuple[int, ...]:
        """Shape in the file of a parameter that has `shape` here, without axes in the name."""
        if self.in_axes is None:
            return shape
        kept, shape = shape[: self._together(naming)], shape[self._together(naming) :]
        output = (*kept, math.prod(shape[self.in_axes :]))
        return (*output, math.prod(shape[: self.in_axes])) if self.in_axes else output

    def file_index(
        self,
        shape: tuple[int, ...],
        index: tuple[slice, ...],
        naming: Literal["hf", "gguf"],
    ) -> tuple[slice, ...]:
        """Where in the file's tensor the part at `index` of a parameter of `shape` lies."""
        if self.in_axes is None:
            return index
        kept = self._together(naming)
        inputs = slice(kept, kept + self.in_axes)
        outputs = slice(kept + self.in_axes, None)
        flat = [_flattened(shape[outputs], index[outputs])]
        if self.in_axes:
            flat.append(_flattened(shape[inputs], index[inputs]))
        return (*index[:kept], *flat)

    def from_file(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The file's array as our parameter, without the axes that are in the name."""
        return (array.swapaxes(-1, -2) if self.in_axes else array).reshape(shape)

    def to_file(self, parameter: np.ndarray, naming: Literal["hf", "gguf"]) -> np.ndarray:
        """Inverse of `from_file`."""
        shape = self.file_shape(parameter.shape, naming)
        if self.in_axes:
            swapped = (*shape[:-2], shape[-1], shape[-2])
            return np.ascontiguousarray(parameter.reshape(swapped).swapaxes(-1, -2))
        return parameter.reshape(shape)

    def _together(self, naming: Literal["hf", "gguf"]) -> int:
        """How many axes of experts lie in one of the file's tensors: one or none."""
        return int(self.experts and "{expert}" not in getattr(self, naming))


def _flattened(shape: tuple[int, ...], index: tuple[slice, ...]) -> slice:
    """The slice of axes that lie in a file as one; only the first of them is ever split."""
    row = math.prod(shape[1:])
    whole = [at.stop - at.start == length for at, length in zip(index[1:], shape[1:], strict=True)]
    assert all(whole), f"{index} of {shape} is not one piece of the file"
    return slice(index[0].start * row, index[0].stop * row)


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
    """(metadata, names of the file's tensors) → config. Metadata also has `tokens`, how many the
    tokenizer has, and `rope_freqs`, that tensor's values, where the file has them."""
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

    def take_or_off(self, name: str, default: Any) -> Any:
        """Like `take`, but a field that is null is off (None), and only an absent one defaults."""
        self.taken.add(name)
        return self.fields.get(name, default)

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
