"""`ObjectStore`: a bucket. What an answer leaves open, a second look decides.

An answer to a conditional write may be lost: the client asks again and hears that the object is
there. A conflict (409) may leave nothing stored. So whenever a write seems lost, the object is read
back: the same bytes are a success, and a missing object is written again.
"""

import datetime
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from decant.store.base import ChangedError, Head, Store, StoreError, require_key
from decant.store.patience import Patience
from decant.store.retry_after import asked_pause
from decant.store.troubles import Again, trouble

Result = TypeVar("Result")
_PART = 32 << 20
"""Bytes of a part of a large file. There may be 10,000 parts."""
_PARTS_AT_ONCE = 4


class _Failed(Exception):
    """A request failed; `again` says whether another may not."""

    def __init__(self, message: str, again: Again) -> None:
        super().__init__(message)
        self.message = message
        self.again: Again = again


class Aged(NamedTuple):
    """One object of a listing."""

    key: str
    size: int
    modified: datetime.datetime


class ObjectStore(Store):
    """Objects of one of obstore's clients. `patience` makes the pauses of one verb."""

    def __init__(
        self,
        client: Any,
        *,
        url: str,
        patience: Callable[[], Patience] = Patience,
        parts_client: Callable[[], Any] | None = None,
    ) -> None:
        """`parts_client` gives a client that repeats a request by itself, for `upload`."""
        self.client = client
        self._parts_client = parts_client or (lambda: client)
        self.url = url
        self.scheme = "gs" if url.startswith("gs://") else "s3"
        self._patience = patience
        self._has_answered = False

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    def get(
        self,
        key: str,
        *,
        start: int = 0,
        length: int | None = None,
        sha256: str | None = None,
        etag: str = "",
    ) -> bytes:
        """Read by one request; whole, or a range.

        ChangedError if `etag` is given, with a length, and the object has another one.
        """
        require_key(key)

        def once() -> bytes:
            if not start and length is None and sha256 is None:
                return self._read_whole(key)
            return self._checked(key, self._read(key, start, length, etag), length, sha256)

        return self._patiently(once, key, "read")

    def _read(self, key: str, start: int, length: int | None, etag: str) -> bytes:
        if length == 0:
            return b""
        if length is not None and etag:
            return self._read_same(key, start, length, etag)
        if length is not None:
            return bytes(self.client.get_range(key, start=start, length=length))
        options = {"range": {"offset": start}} if start else None
        result = self.client.get(key, options=options)
        first, end = result.range
        return self._checked(key, bytes(result.bytes()), end - first, None)

    def _read_same(self, key: str, start: int, length: int, etag: str) -> bytes:
        from obstore.exceptions import PreconditionError

        options = {"range": (start, start + length), "if_match": etag}
        try:
            return bytes(self.client.get(key, options=options).bytes())
        except PreconditionError:
            told = f"{self.url}/{key}: changed since its first bytes were read"
            raise ChangedError(told) from None

    def _read_whole(self, key: str) -> bytes:
        """All bytes, of which nothing is known: they have the md5 that the store tells, or two
        reads give the same, and as many as the store says apart."""
        result = self.client.get(key)
        data = bytes(result.bytes())
        known = _md5_in(result.meta) == hashlib.md5(data, usedforsecurity=False).hexdigest()
        if known:
            return data
        if data != bytes(self.client.get(key).bytes()):
            raise _Failed("two reads gave different bytes", "damaged")
        return self._checked(key, data, self._head(key).size, None)

    def _checked(self, key: str, data: bytes, length: int | None, sha256: str | None) -> bytes:
        if length is not None and len(data) != length:
            raise _Failed(f"expected {length:,} bytes, got {len(data):,}", "damaged")
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise _Failed("has other bytes than those expected, by their sha256", "damaged")
        return data

    def head(self, key: str) -> Head | None:
        """Ask for size and version."""
        require_key(key)
        try:
            return self._patiently(lambda: self._head(key), key, "read")
        except FileNotFoundError:
            return None

    def _head(self, key: str) -> Head:
        try:
            meta = self.client.head(key)
        except Exception as error:
            if "status code: 403" in str(error):
                self.client.get_range(key, start=0, length=1)  # that answer says why
            raise
        return Head(
            meta["size"], meta[self._version_name] or "", _md5_in(meta), meta["e_tag"] or ""
        )

    @property
    def wrong_version(self) -> str:
        """A version that no object has."""
        return "1" if self.scheme == "gs" else '"0123456789abcdef0123456789abcdef"'

    @property
    def _version_name(self) -> str:
        return "version" if self.scheme == "gs" else "e_tag"

    def create(self, key: str, data: bytes) -> bool:
        """Write with `If-None-Match: *`, or its like."""
        return self._conditionally(key, data, mode="create", expected=None)

    def swap(self, key: str, data: bytes, expected_version: str) -> bool:
        """Write with `If-Match`, or its like."""
        mode = {self._version_name: expected_version}
        return self._conditionally(key, data, mode=mode, expected=expected_version)

    def _conditionally(self, key: str, data: bytes, *, mode: Any, expected: str | None) -> bool:
        require_key(key)
        patience = self._patience()
        while True:
            failed = self._write(key, data, mode)
            if failed is None:
                self._has_answered = True
                return True
            if failed.again in ("no", "missing"):
                raise StoreError(f"{self.url}/{key}: {failed.message}")
            # The request failed, was refused or was done and its answer lost.
            found, version = self._read_back(key)
            if found == data:
                return True
            if found is None and expected is not None:
                return False
            if version != (expected or None):
                return False
            self._wait(patience, failed, key)

    def _write(self, key: str, data: bytes, mode: Any) -> _Failed | None:
        try:
            self.client.put(key, data, mode=mode, use_multipart=False)
        except Exception as error:
            return self._failure(error, "write")
        return None

    def _read_back(self, key: str) -> tuple[bytes | None, str | None]:
        """The object's bytes and version, or twice None; believed when two looks agree."""
        before = None
        while True:
            head = self.head(key)
            try:
                seen = (self.get(key, length=head.size), head.version) if head else (None, None)
            except FileNotFoundError:  # deleted in between
                seen = (None, None)
            if seen == before:
                return seen
            before = seen

    def put(self, key: str, data: bytes) -> None:
        """Write in one request."""
        require_key(key)

        def once() -> None:
            if failed := self._write(key, data, "overwrite"):
                raise failed

        self._patiently(once, key, "write")

    def upload(self, key: str, path: Path) -> None:
        """Write the bytes of a file, a large one in parts, so that little lies in memory."""
        require_key(key)

        def once() -> None:
            try:
                self._parts_client().put(
                    key, path, chunk_size=_PART, max_concurrency=_PARTS_AT_ONCE
                )
            except Exception as error:
                raise self._failure(error, "write") from None

        self._patiently(once, key, "write")

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """As `entries`, without the ETag."""
        return ((key, size) for key, size, _ in self.entries(prefix))

    def entries(self, prefix: str = "") -> Iterator[tuple[str, int, str]]:
        """(key, bytes, ETag), listed as by `list`."""
        return ((meta["path"], meta["size"], meta["e_tag"] or "") for meta in self._listed(prefix))

    def aged(self, prefix: str = "") -> Iterator[Aged]:
        """As `list`, with the time at which each object was written."""
        return (
            Aged(meta["path"], meta["size"], meta["last_modified"]) for meta in self._listed(prefix)
        )

    def _listed(self, prefix: str) -> Iterator[Any]:
        """What the server says of each object: page by page, after a failure from the last key
        on."""
        last: str | None = None
        if prefix:
            require_key(prefix)
        patience = self._patience()
        while True:
            try:
                for chunk in self.client.list(prefix or None, offset=last):
                    for meta in chunk:
                        yield meta
                        last = meta["path"]
                    patience = self._patience()
                return
            except Exception as error:
                failed = self._failure(error, "list")
            self._wait(patience, failed, prefix)

    def delete(self, key: str) -> None:
        """Delete the object."""
        require_key(key)
        try:
            self._patiently(lambda: self.client.delete(key), key, "delete")
        except FileNotFoundError:
            return

    def _patiently(self, once: Callable[[], Result], key: str, doing: str) -> Result:
        """What `once` returns, tried again while that may help.

        FileNotFoundError, or StoreError.
        """
        patience = self._patience()
        while True:
            try:
                result = once()
                self._has_answered = True
                return result
            except ChangedError:
                raise
            except Exception as error:
                failed = self._failure(error, doing)
            if failed.again == "missing":
                raise FileNotFoundError(f"{self.url}/{key}: {failed.message}")
            self._wait(patience, failed, key)

    def _wait(self, patience: Patience, failed: _Failed, key: str) -> None:
        """Pause before the next try. StoreError if there is to be none."""
        again, asked = failed.again, 0.0
        if again == "absent" and self._has_answered:
            again = "long"  # its name is right: it, or the network, is down
        if again == "busy" and patience.failed["busy"]:
            asked = asked_pause(self.client, key or ".")
        if patience.wait(again, asked=asked):
            return
        told = f", not before {asked:,.0f} seconds" if asked else ""
        raise StoreError(f"{self.url}{'/' if key else ''}{key}: {failed.message}{told}")

    def _failure(self, error: Exception, doing: str) -> _Failed:
        if isinstance(error, _Failed):
            return error
        if isinstance(error, FileNotFoundError) and "status" not in str(error):
            return _Failed("there is no such object", "missing")  # of the memory's client
        if type(error).__module__.startswith("obstore") or isinstance(error, OSError):
            failed = _Failed(*trouble(str(error), scheme=self.scheme, doing=doing))
            self._has_answered |= failed.again in ("missing", "busy")
            return failed
        raise error


def _md5_in(meta: Any) -> str:
    """The md5 that an ETag is for objects that were put in one piece; empty if it is none."""
    tag = (meta["e_tag"] or "").strip('"')
    return tag if re.fullmatch("[0-9a-f]{32}", tag) else ""
