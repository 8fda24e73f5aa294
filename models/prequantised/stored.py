"""Tensors as files store them: what their headers say, and reading a part of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Index = tuple[slice, ...]
"""A slice with start and stop for each axis."""
Read = Callable[[str, Index | None], np.ndarray]
"""Gives a tensor of the files as it is stored, or the elements at an index of it."""


class InFile(NamedTuple):
    """A tensor of the files as their headers describe it."""

    dtype: str
    """Such as "I32"."""
    shape: tuple[int, ...]


Header = Mapping[str, InFile]
"""Name → tensor, of all files of a checkpoint."""
AT_ONCE = 1 << 23
"""Elements that are dequantised at once: their float32 and what it is made of take about 100 MB."""
KINDS = ("FP8", "INT8", "INT4", "INT2", "MXFP4")
"""How numbers of few bits are stored, apart from their scales."""


def full_index(shape: tuple[int, ...]) -> Index:
    """The index of a whole array."""
    return tuple(slice(0, length) for length in shape)
