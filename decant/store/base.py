"""`Store`: the few verbs in which files and objects are read and written."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple


class StoreError(OSError):
    """A store could not do what was asked: where, why, and what to do about it."""


class ChangedError(StoreError):
    """An object is another one than its reader has begun to read."""


class Head(NamedTuple):
    """Facts about one object."""

    size: int
    """Bytes."""
    version: str
    """Changes when the object is written; for `Store.swap`."""
    md5: str = ""
    """The bytes' md5 in hex, if the store tells it. Some buckets tell another number of this form,
    so an equal one says that the bytes are the same, and another one nothing."""
    etag: str = ""
    """The server's name for these bytes; empty in a directory. For `ObjectStore.get`."""


class Store(ABC):
    """Objects by key below one address. Keys are relative, such as `parts/0000/plan.json`.

    All verbs raise StoreError if the store cannot be reached or refuses, and ValueError for a key
    that is none. Temporary failures are retried first. Threads may share a store.
    """

    url: str
    """The address or path that was opened."""

    @abstractmethod
    def get(
        self, key: str, *, start: int = 0, length: int | None = None, sha256: str | None = None
    ) -> bytes:
        """The object's bytes, or `length` of them from `start`.

        FileNotFoundError if there is no such object. StoreError unless there are exactly `length`
        bytes, with this `sha256` in hex. A whole object is right also without them; a range may
        have wrong bytes unless its hash is known.
        """

    @abstractmethod
    def head(self, key: str) -> Head | None:
        """Size and version; None if there is no such object."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Write the object if there is none.

        Returns whether it now holds exactly `data`, whoever wrote it.
        """

    @abstractmethod
    def swap(self, key: str, data: bytes, expected_version: str) -> bool:
        """Replace the object if it still has this version.

        True if it holds exactly `data` afterwards. False if it is missing or has another version.
        """

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write the object, whatever is there. Readers see the old bytes or the new ones."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(key, bytes) of all objects whose keys begin with `prefix` and a slash, in no order.

        An empty prefix lists all. What a listing lacks may still be there.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete the object; nothing happens if there is none."""


def require_key(key: str) -> str:
    """The key. ValueError unless it leads to one place below the store, by one spelling only."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or not key.isprintable() or "\\" in key:
        raise ValueError(
            f"{key!r} cannot be a key: expected names with slashes between them, such as a/b.json"
        )
    if len(key.encode()) > 900:  # a bucket allows 1,024 with the prefix
        raise ValueError(f"a key has {len(key.encode())} bytes, more than 900: {key[:80]}…")
    return key
