"""A `.zst` file as a stream of its bytes, in which an end that is missing is an error."""

import io
from pathlib import Path

import zstandard

_CHUNK_BYTES = 1 << 16
_LARGEST_WINDOW = 1 << 31  # what `zstd --long=31` writes, as some public corpora are


class ZstdFile(io.RawIOBase):
    """Reads frame after frame. EOFError where the file ends inside one.

    zstandard's own stream reader takes a frame that was cut off for one that ended.
    """

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer) -> int:
        """Fill `buffer` as far as one chunk of the file goes; 0 at the end."""
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
        """Close the file beneath, too."""
        self._file.close()
        super().close()
