"""Where one parameter lies in a checkpoint's files: tensor names, shapes and layout."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np

Naming = Literal["hf", "gguf"]


@dataclasses.dataclass(frozen=True)
class Part:
    """Which outputs of a file's tensor are one parameter's; the others are other parameters'.

    The outputs are runs of `size`, and of each run `start` to `stop` are the parameter's.
    """

    start: int
    stop: int
    size: int
    runs: int = 1

    def covering(self, own: slice) -> slice:
        """The smallest slice of the tensor's outputs that covers a slice of the parameter's."""
        if self.runs == 1:
            return slice(self.start + own.start, self.start + own.stop)
        width = self.stop - self.start
        first, last = (divmod(at, width) for at in (own.start, own.stop))
        assert first[1] == last[1] == 0, f"{own} cuts runs of {self}"
        return slice(first[0] * self.size, last[0] * self.size)

    def own(self, array: np.ndarray, axis: int) -> np.ndarray:
        """The parameter's outputs among whole runs along `axis`, as [run, output] in its place.

        It is a view, so that it can be written to.
        """
        axis %= array.ndim
        apart = (*array.shape[:axis], -1, self.size, *array.shape[axis + 1 :])
        return array.reshape(apart)[(slice(None),) * (axis + 1) + (slice(self.start, self.stop),)]


@dataclasses.dataclass(frozen=True)
class TensorName:
    """The names of one of our parameters in files, and how files lay it out.

    A name with `{layer}` stands for one tensor a block, and one with `{expert}` for one tensor an
    expert. Our parameter stacks those tensors along leading axes.
    """

    hf: str
    gguf: str
    """Empty in families that have no GGUF architecture."""
    in_axes: int | None = None
    """For a linear map: how many leading axes of our parameter (not counting layers and experts)
    are its input. Files store the map flattened, as [output, input]. 0 marks the map's bias, which
    files store flat. None: files store the parameter in our shape."""
    rotary: bool = False
    """Llama's GGUF files interleave the two halves of each head of this parameter."""
    experts: bool = False
    """Our parameter has an axis of experts. If a name lacks `{expert}`, the file's tensor has that
    axis too."""
    input_first: bool = False
    """Hugging Face files store this linear map as [input, output]."""
    part: Part | None = None
    """Which outputs of the tensor are this parameter's. None: all."""
    order: tuple[int, ...] | None = None
    """Files store the parameter's axes apart and in this order, without stacked ones. None: as
    `in_axes` says."""
    layers: tuple[int, ...] | None = None
    """The numbers in files of the parameter's layers. None: from 0 on."""
    by_channel: bool = False
    """A convolution of each channel by itself: its taps count as the input of a linear map. Files
    have an axis of length 1 between output and input."""

    def file_tensors(self, naming: Naming, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names of the file's tensors → their index along the stacked axes of our parameter.

        `shape` is our parameter's, stacked axes included.
        """
        pattern = getattr(self, naming)
        axes = [axis for axis in ("layer", "expert") if f"{{{axis}}}" in pattern]

        def named(at: tuple[int, ...]) -> str:
            numbers = dict(zip(axes, at, strict=True))
            if "layer" in numbers and self.layers is not None:
                numbers["layer"] = self.layers[numbers["layer"]]
            return pattern.format(**numbers)

        return {named(at): at for at in np.ndindex(*shape[: len(axes)])}

    def file_shape(self, shape: tuple[int, ...], naming: Naming) -> tuple[int, ...]:
        """Shape of one tensor in the file; `shape` is our parameter's without stacked axes."""
        if self.order is not None:
            return tuple(shape[axis] for axis in self.order)
        if self.in_axes is None:
            return shape
        count = self._expert_axes(naming)
        experts, shape = shape[:count], shape[count:]
        outputs = math.prod(shape[self.in_axes :])
        flat = [outputs if self.part is None else self.part.size * self.part.runs]
        if self.in_axes:
            flat.append(math.prod(shape[: self.in_axes]))
        return (*experts, *self._in_order(flat, naming, 1))

    def file_index(
        self, shape: tuple[int, ...], index: tuple[slice, ...], naming: Naming
    ) -> tuple[slice, ...]:
        """The index into the file's tensor that reads `index` of our parameter.

        `shape` and `index` are our parameter's without stacked axes. Where a `part` has several
        runs, it reads the other parameters' outputs between them too.
        """
        if self.order is not None:
            return tuple(index[axis] for axis in self.order)
        if self.in_axes is None:
            return index
        experts = self._expert_axes(naming)
        inputs = slice(experts, experts + self.in_axes)
        outputs = slice(experts + self.in_axes, None)
        flat = [_flatten(shape[outputs], index[outputs])]
        if self.part:
            flat = [self.part.covering(flat[0])]
        if self.in_axes:
            flat.append(_flatten(shape[inputs], index[inputs]))
        return (*index[:experts], *self._in_order(flat, naming, slice(0, 1)))

    def from_file(self, array: np.ndarray, shape: tuple[int, ...], naming: Naming) -> np.ndarray:
        """The file's array in our layout; `shape` is the result's, without stacked axes."""
        if self.order is not None:
            return array.transpose(np.argsort(self.order))
        if self.by_channel:
            array = array.squeeze(-2)
        if self.in_axes and not self._input_first(naming):
            array = array.swapaxes(-1, -2)
        if self.part and self.part.runs > 1:
            array = self.part.own(array, -1)
        return array.reshape(shape)

    def to_file(
        self, parameter: np.ndarray, naming: Naming, whole: np.ndarray | None = None
    ) -> np.ndarray:
        """Inverse of `from_file`.

        `whole` is the file's tensor as far as other parameters have filled it, if there are any.
        """
        if self.order is not None:
            return np.ascontiguousarray(parameter.transpose(self.order))
        shape = self.file_shape(parameter.shape, naming)
        if self.by_channel:
            flat = dataclasses.replace(self, by_channel=False)
            array = flat.to_file(parameter, naming, None if whole is None else whole.squeeze(-2))
            return array.reshape(shape)
        swapped = self.in_axes and not self._input_first(naming)
        ours = (*shape[:-2], shape[-1], shape[-2]) if swapped else shape
        if self.part is None:
            array = parameter.reshape(ours)
            return np.ascontiguousarray(array.swapaxes(-1, -2)) if swapped else array
        whole = np.empty(shape, parameter.dtype) if whole is None else whole
        own = self.part.own(whole.swapaxes(-1, -2) if swapped else whole, -1)
        own[...] = parameter.reshape(own.shape)
        return whole

    def _in_order(self, flat: list[Any], naming: Naming, one: Any) -> list[Any]:
        """[output, input] in the order of the file's axes; `one` stands for an axis of length 1."""
        if self.by_channel:
            return [flat[0], one, flat[1]]
        return flat[::-1] if self._input_first(naming) else flat

    def _input_first(self, naming: Naming) -> bool:
        return self.input_first and naming == "hf"

    def _expert_axes(self, naming: Naming) -> int:
        """How many axes of experts one of the file's tensors has: 1 or 0."""
        return int(self.experts and "{expert}" not in getattr(self, naming))


def _flatten(shape: tuple[int, ...], index: tuple[slice, ...]) -> slice:
    """`index` of axes that files flatten into one; only the first axis may be split."""
    if not shape:  # one number
        return slice(0, 1)
    row = math.prod(shape[1:])
    whole = [at.stop - at.start == length for at, length in zip(index[1:], shape[1:], strict=True)]
    assert all(whole), f"{index} of {shape} is not one piece of the file"
    return slice(index[0].start * row, index[0].stop * row)
