"""Reads a `.zst` file as a stream of its decompressed bytes; a missing end is an error."""

import io
from typing import BinaryIO

import zstandard

_CHUNK_BYTES = 1 << 16
_LARGEST_WINDOW = 1 << 31  # some public corpora were written with `zstd --long=31`


class ZstdFile(io.RawIOBase):
    """Reads one frame after another. EOFError if the file ends inside a frame.

    zstandard's own stream reader takes a frame that was cut off for a complete one.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer) -> int:
        """Write at most one chunk's bytes to `buffer`; returns their number, 0 at the end."""
        while not self._text:
            packed = self._packed or self._file.read(_CHUNK_BYTES)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._text, self._packed = memoryview(self._frame.decompress(packed)), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count

    def close(self) -> None:
        """Close this stream and its file."""
        self._file.close()
        super().close()
