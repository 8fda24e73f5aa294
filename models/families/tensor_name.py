"""Where one parameter lies in a checkpoint's files: tensor names, shapes and layout."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np

Naming = Literal["hf", "gguf"]


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
    """Files store this linear map as [input, output]."""
    every: tuple[int, int] = (0, 1)
    """(start, step): the parameter is every step-th entry of the last axis of the file's tensor,
    which holds other parameters between them."""

    def file_tensors(self, naming: Naming, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names of the file's tensors → their index along the stacked axes of our parameter.

        `shape` is our parameter's, stacked axes included.
        """
        pattern = getattr(self, naming)
        axes = [axis for axis in ("layer", "expert") if f"{{{axis}}}" in pattern]
        places = np.ndindex(*shape[: len(axes)])
        return {pattern.format(**dict(zip(axes, at, strict=True))): at for at in places}

    def file_shape(self, shape: tuple[int, ...], naming: Naming) -> tuple[int, ...]:
        """Shape of one tensor in the file; `shape` is our parameter's without stacked axes."""
        if self.in_axes is None:
            return shape
        count = self._expert_axes(naming)
        experts, shape = shape[:count], shape[count:]
        flat = [math.prod(shape[self.in_axes :])]
        if self.in_axes:
            flat.insert(int(not self.input_first), math.prod(shape[: self.in_axes]))
        flat[-1] *= self.every[1]
        return (*experts, *flat)

    def file_index(
        self, shape: tuple[int, ...], index: tuple[slice, ...], naming: Naming
    ) -> tuple[slice, ...]:
        """The index into the file's tensor that reads `index` of our parameter.

        `shape` and `index` are our parameter's without stacked axes. Where parameters take turns,
        the elements of the others between them are read too.
        """
        if self.in_axes is None:
            return index
        experts = self._expert_axes(naming)
        inputs = slice(experts, experts + self.in_axes)
        outputs = slice(experts + self.in_axes, None)
        flat = [_flatten(shape[outputs], index[outputs])]
        if self.in_axes:
            flat.insert(int(not self.input_first), _flatten(shape[inputs], index[inputs]))
        step = self.every[1]
        flat[-1] = slice(flat[-1].start * step, flat[-1].stop * step)
        return (*index[:experts], *flat)

    def from_file(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The file's array in our layout; `shape` is the result's, without stacked axes."""
        start, step = self.every
        array = array[..., start::step] if step > 1 else array
        swapped = self.in_axes and not self.input_first
        return (array.swapaxes(-1, -2) if swapped else array).reshape(shape)

    def to_file(
        self, parameter: np.ndarray, naming: Naming, whole: np.ndarray | None = None
    ) -> np.ndarray:
        """Inverse of `from_file`.

        `whole`: the file's tensor with other parameters that it holds, which gets this one too.
        """
        shape = self.file_shape(parameter.shape, naming)
        start, step = self.every
        own = (*shape[:-1], shape[-1] // step)
        if self.in_axes and not self.input_first:
            swapped = (*own[:-2], own[-1], own[-2])
            array = np.ascontiguousarray(parameter.reshape(swapped).swapaxes(-1, -2))
        else:
            array = parameter.reshape(own)
        if step == 1:
            return array
        whole = np.zeros(shape, array.dtype) if whole is None else whole
        whole[..., start::step] = array
        return whole

    def _expert_axes(self, naming: Naming) -> int:
        """How many axes of experts one of the file's tensors has: 1 or 0."""
        return int(self.experts and "{expert}" not in getattr(self, naming))


def _flatten(shape: tuple[int, ...], index: tuple[slice, ...]) -> slice:
    """`index` of axes that files flatten into one; only the first axis may be split."""
    row = math.prod(shape[1:])
    whole = [at.stop - at.start == length for at, length in zip(index[1:], shape[1:], strict=True)]
    assert all(whole), f"{index} of {shape} is not one piece of the file"
    return slice(index[0].start * row, index[0].stop * row)
