"""`PosixStore`: a plain directory. Every write is durable and all or nothing.

Nothing below the directory is reached through links: it may hold a stranger's cache, whose link
`parts` may lead to a home directory.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from decant.store.base import Head, Store, StoreError, require_key
from decant.store.whole_file import beside, flush, is_temporary

_LOCK = ".store.lock"


class PosixStore(Store):
    """Files below the directory `root`, which is made with the first file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def __repr__(self) -> str:
        return f"PosixStore({self.url!r})"

    def get(
        self, key: str, *, start: int = 0, length: int | None = None, sha256: str | None = None
    ) -> bytes:
        """Read the file's bytes."""
        path = self._path(key)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(-1 if length is None else length)
        if length is not None and len(data) != length:
            raise StoreError(
                f"{path}: has no {length:,} bytes from byte {start:,} on; got {len(data):,}"
            )
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise StoreError(f"{path}: has other bytes than those expected, by their sha256")
        return data

    def head(self, key: str) -> Head | None:
        """Size, and a version out of inode and time: every write makes a new file."""
        try:
            found = self._path(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Head(found.st_size, f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}")

    def create(self, key: str, data: bytes) -> bool:
        """Link a flushed file to the name, which fails if the name is taken."""
        path = self._path(key)
        with self._written(path, data) as temporary, contextlib.suppress(FileExistsError):
            os.link(temporary, path)
            return True
        return path.read_bytes() == data

    def swap(self, key: str, data: bytes, expected_version: str) -> bool:
        """Compare and rename under a lock of the directory."""
        path = self._path(key)
        if not path.exists():
            return False
        with self._written(path, data) as temporary, self._alone():
            found = self.head(key)
            if found and found.version == expected_version:
                temporary.replace(path)
                return True
        return found is not None and path.read_bytes() == data

    def put(self, key: str, data: bytes) -> None:
        """Rename a flushed file over the name. It does not wait for a `swap`."""
        path = self._path(key)
        with self._written(path, data) as temporary:
            temporary.replace(path)

    def link(self, key: str, other: str) -> bool:
        """Make `other` one more name of the file `key`; False if the disk has no such links.

        For files that are never changed in place.
        """
        path = self._path(other)
        with beside(path) as temporary:
            try:
                os.link(self._path(key), temporary)
            except OSError:
                return False
            temporary.replace(path)
            flush(path.parent)
        return True

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Files of this store; without those that are being written."""
        folder = self._path(prefix) if prefix else self.root
        for path in folder.rglob("*"):
            if path.name != _LOCK and not is_temporary(path) and path.is_file():
                yield path.relative_to(self.root).as_posix(), path.stat().st_size

    def delete(self, key: str) -> None:
        """Delete the file."""
        path = self._path(key)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()

    def _path(self, key: str) -> Path:
        path = self.root
        for name in require_key(key).split("/"):
            path /= name
            if path.is_symlink():
                raise ValueError(
                    f"{path}: is a link, which is not followed. Put the files there instead"
                )
        return path

    @contextlib.contextmanager
    def _written(self, path: Path, data: bytes) -> Iterator[Path]:
        """A flushed file beside `path`, which the block names; its directory is flushed after."""
        with beside(path) as temporary:
            temporary.write_bytes(data)
            flush(temporary)
            yield temporary
            flush(path.parent)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else swaps in this directory meanwhile."""
        descriptor = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
