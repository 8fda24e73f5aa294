"""A file at an address such as `s3://bucket/name`, read by ranges of its bytes."""

import io
from collections.abc import Callable
from dataclasses import dataclass

BUFFER = 8 << 20
"""Bytes of a request that reads on through a file."""
_FIRST = 256 << 10
"""Bytes of the first request: often only the first record is wanted."""
_BEYOND = 64 << 10
"""Bytes of a request behind the end of the span that is read."""


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address, as its server lists it."""

    url: str
    bytes: int
    version: str
    """What changes with the content, such as an ETag; empty if the server names none."""
    sha256: str = ""
    """Of the content, if the server knows it; else empty."""


Read = Callable[[int, int], bytes]
"""Given a start and a length, returns so many bytes of a file."""


class RangeFile(io.RawIOBase):
    """A remote file as Python reads files. Each read is one request.

    RuntimeError if the server fails: readers take ValueError and OSError for damage of the content.
    """

    def __init__(self, read: Read, file: RemoteFile):
        self._read, self._file = read, file
        self._at = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to `offset` from the start, the current place or the end; returns the new place."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at}.get(whence, self._file.bytes)
        return self._at

    def tell(self) -> int:
        """The current place."""
        return self._at

    def readinto(self, buffer) -> int:
        """Fill `buffer`, or as much as there is; returns the number of bytes, 0 at the end."""
        length = self._length(min(len(buffer), max(self._file.bytes - self._at, 0)))
        if not length:
            return 0
        try:
            data = self._read(self._at, length)
        except (OSError, ValueError) as error:
            raise RuntimeError(str(error)) from error
        if len(data) != length:
            raise RuntimeError(
                f"{self._file.url}: {len(data)} bytes came where {length} were asked for"
            )
        buffer[:length] = data
        self._at += length
        return length

    def _length(self, most: int) -> int:
        return most


class SequentialFile(RangeFile):
    """A remote file that is read on from some place: a first little, and then more and more.

    `until` is the end of the bytes that are wanted, as far as known; few are read behind it.
    """

    def __init__(self, read: Read, file: RemoteFile, *, until: int | None = None):
        super().__init__(read, file)
        self._until = file.bytes if until is None else until
        self._most = _FIRST

    def _length(self, most: int) -> int:
        length = min(most, self._most, max(self._until - self._at, _BEYOND))
        self._most = min(4 * self._most, BUFFER)
        return length
