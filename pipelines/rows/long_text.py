"""Texts and tokens that are too long to be held in memory: read from a file whenever needed."""

import hashlib
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np


class LongText:
    """The text of a long document. `chunks` reads it from its beginning, every time it is called,
    and raises ValueError if it cannot be read."""

    def __init__(self, chunks: Callable[[], Iterator[str]]):
        self.chunks = chunks

    @cached_property
    def sha256(self) -> bytes:
        """The hash of the text in UTF-8. ValueError with the problem if it cannot be read."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk.encode())
        return digest.digest()


class LongArray:
    """A one-dimensional array in a temporary file. It grows at its end, and slices are read."""

    def __init__(self, dtype: str):
        self._dtype = np.dtype(dtype)
        descriptor, name = tempfile.mkstemp(prefix="decant-")
        self._file = os.fdopen(descriptor, "w+b")
        Path(name).unlink()
        weakref.finalize(self, self._file.close)  # and with that the file is gone
        self._length = 0
        self._largest = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(self._length)
        assert step == 1, "slices are read as they lie in the file"
        self._file.flush()
        size = self._dtype.itemsize
        data = os.pread(self._file.fileno(), max(0, stop - start) * size, start * size)
        return np.frombuffer(data, self._dtype)

    def append(self, values: np.ndarray) -> None:
        """Add values at the end."""
        self._file.write(values.astype(self._dtype).tobytes())
        self._length += len(values)
        self._largest = max(self._largest, int(values.max(initial=0)))

    def cut(self, length: int) -> None:
        """Leave only the first `length` values."""
        self._length = length

    def max(self, *, initial: int) -> int:
        """The largest value, at least `initial`."""
        return max(self._largest, initial)


@dataclass(frozen=True)
class LongSegment:
    """An uncut document like `Segment`, with arrays in files."""

    tokens: LongArray
    counted: LongArray
    source: int
    document: int
    start: int = 0
    logprobs: None = None
    """Only rollouts have them, which are held in memory."""
