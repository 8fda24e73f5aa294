"""A .safetensors file: its header, and tensors of which only the rows asked for are read.

The `safetensors` package is not used to read: with numpy it has no 8-bit floats, and it reads no
buckets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from decant.models.checkpoints.file_bytes import AT_ONCE, LocalFile, RemoteFile

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
_LENGTH = 8
"""Bytes of the number of bytes of the header."""
_LONGEST_HEADER = 100_000_000


class Tensor(NamedTuple):
    """A tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte of the file at which it begins."""
    end: int


class SafetensorsFile:
    """One file. ValueError if its header is damaged.

    Every tensor lies inside the file, and no byte belongs to two of them.
    """

    def __init__(self, file: LocalFile | RemoteFile):
        self.file = file
        try:
            self._tensors = self._header()
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{file.where}: weights cannot be read: {error}. {file.again} the file again if it "
                "was cut short."
            ) from error

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._tensors)

    def get_slice(self, name: str) -> Slice:
        """A tensor of which nothing is read yet."""
        return Slice(self, self._tensors[name])

    def get_tensor(self, name: str) -> np.ndarray:
        """All elements of a tensor."""
        return self.get_slice(name)[()]

    def _header(self) -> dict[str, Tensor]:
        size = self.file.size
        if size < _LENGTH:
            raise ValueError(f"{size} bytes are no .safetensors file")
        length = int.from_bytes(self.file.read(0, _LENGTH).tobytes(), "little")
        first = _LENGTH + length
        if length > _LONGEST_HEADER or first > size:
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        header = json.loads(self.file.read(_LENGTH, first).tobytes())
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        tensors = {name: _tensor(name, entry, first) for name, entry in header.items()}
        at = first
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
            if tensor.start != at:
                raise ValueError(f"tensor {name} does not begin where the one before it ends")
            at = tensor.end
        if at != size:
            raise ValueError(f"its tensors end at byte {at:,}, but it has {size:,}")
        return tensors


class Slice:
    """A tensor of a file, of which an index reads a part."""

    def __init__(self, file: SafetensorsFile, tensor: Tensor):
        self._file, self._tensor = file, tensor

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """How its numbers are stored, such as "BF16"."""
        return self._tensor.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """The elements at `index`, contiguous slices.

        Of the first axis only the rows in `index` are read. Rows are read whole: a request costs
        as much time as some hundred kilobytes, and a share's part of a row is shorter.
        """
        tensor, dtype = self._tensor, _DTYPES[self._tensor.dtype]
        if not tensor.shape:
            return self._rows(0, 1, dtype).reshape(())
        rows = index[0] if index else slice(None)
        first, last, _ = rows.indices(tensor.shape[0])
        inner = index[1:]
        if all(s.indices(n)[:2] == (0, n) for s, n in zip(inner, tensor.shape[1:], strict=False)):
            return self._rows(first, last, dtype)
        blocks = [self._rows(*block, dtype)[:, *inner] for block in self._blocks(first, last)]
        return np.concatenate(blocks)

    def _blocks(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Runs of rows of about as many bytes as are requested at once."""
        row = (self._tensor.end - self._tensor.start) // max(self._tensor.shape[0], 1)
        step = max(1, AT_ONCE // max(row, 1))
        return ((at, min(at + step, last)) for at in range(first, last, step))

    def _rows(self, first: int, last: int, dtype: np.dtype[Any]) -> np.ndarray:
        inner = self._tensor.shape[1:]
        row, last = math.prod(inner) * dtype.itemsize, max(first, last)
        start = self._tensor.start
        data = self._file.file.read(start + first * row, start + last * row)
        return data.view(dtype).reshape(last - first, *inner)


def _tensor(name: str, entry: dict[str, Any], first: int) -> Tensor:
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    numbers = (*shape, start, end)
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or end < start:
        raise ValueError(f"tensor {name} has impossible places")
    known = _DTYPES.get(entry["dtype"])
    if known and math.prod(shape) * known.itemsize != end - start:
        raise ValueError(f"tensor {name} has {end - start:,} bytes, which do not fit its shape")
    return Tensor(str(entry["dtype"]), shape, first + start, first + end)
