"""The bytes of a file with weights, on this machine or in a bucket, of which ranges are read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from decant.schemas.disk.identity import remembered_digests
from decant.store.objects import ObjectStore

_PIECE = 32 << 20
"""Bytes of a request."""
_REQUESTS = 8
"""Requests under way at once."""
AT_ONCE = _REQUESTS * _PIECE
"""Bytes that are requested at once."""
_FILES_AT_ONCE = 8


class LocalFile:
    """A file of this machine, mapped into memory."""

    again = "Download"
    """How one gets a new copy."""

    def __init__(self, path: Path):
        self.where = str(path)
        self.size = path.stat().st_size
        self._mapped = np.memmap(path, np.uint8, mode="r") if self.size else np.empty(0, np.uint8)

    def read(self, start: int, end: int) -> np.ndarray:
        """The bytes [start, end), which are not copied."""
        return np.asarray(self._mapped[start:end])


class RemoteFile:
    """A file in a bucket, read by range.

    StoreError if the bucket refuses or cannot be reached, and its ChangedError if the file is
    another one than it was.
    """

    again = "Upload"

    def __init__(self, store: ObjectStore, key: str, *, bytes: int, etag: str):
        self._store, self._key, self._etag = store, key, etag
        self.where = f"{store.url}/{key}"
        self.size = bytes

    def read(self, start: int, end: int) -> np.ndarray:
        """The bytes [start, end), by several requests at once."""
        data = np.empty(end - start, np.uint8)

        def fetch(at: int) -> None:
            piece = self._get(at, min(at + _PIECE, end))
            data[at - start : at - start + len(piece)] = np.frombuffer(piece, np.uint8)

        starts = range(start, end, _PIECE)
        with ThreadPoolExecutor(_REQUESTS) as pool:
            each = pool.map if len(starts) > 1 else map
            for _ in each(fetch, starts):
                pass
        return data

    @property
    def version(self) -> str:
        """Names the address and the bytes that lie there now."""
        return f"{self.where} {self._etag} {self.size}"

    def sha256(self) -> str:
        """The hash of all bytes, in hex; they are read once."""
        digest = hashlib.sha256()
        for at in range(0, self.size, _PIECE):
            digest.update(self._get(at, min(at + _PIECE, self.size)))
        return digest.hexdigest()

    def _get(self, start: int, end: int) -> bytes:
        return self._store.get(self._key, start=start, length=end - start, etag=self._etag)


def remote_sha256s(files: Sequence[RemoteFile], *, memory: Path) -> list[str]:
    """Hash of each file; the file `memory` keeps them between runs."""
    reads = {file.version: file.sha256 for file in files}
    known = remembered_digests(reads, memory=memory, threads=_FILES_AT_ONCE)
    return [known[file.version] for file in files]
