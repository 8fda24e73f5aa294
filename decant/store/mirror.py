"""`Mirror`: a folder on this machine with the parts of a bucket's objects that were read.

    PLACE/decant-mirror-UID/NAME-ID/files/…    sparse files with the objects' names and sizes
    PLACE/decant-mirror-UID/NAME-ID/maps/…     which pages of each are here

ID is a hash of the address and of the object that describes the others, so other contents get
another folder. Several processes may use one place at once. Files with a map are deleted, the
longest unused first, when all mirrors of a place have more bytes than the limit. Nothing else is.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from decant.store.base import Store, StoreError, require_key
from decant.store.mirrored_file import MirroredFile
from decant.store.opening import open_store
from decant.store.whole_file import write_whole

_REQUESTS = 32
"""Requests at once: at 20 ms each, 1,600 a second."""
_ROOT, _FILES, _MAPS = "decant-mirror-{}", "files", "maps"


class _Found(NamedTuple):
    used: int
    bytes: int
    path: Path
    marks: Path


def default_place() -> Path:
    """Where mirrors lie: DECANT_MIRROR, else the user's cache directory."""
    if place := os.environ.get("DECANT_MIRROR"):
        return Path(place)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "decant"


def open_mirror(
    url: str, *, first: str, place: Path | None = None, most_bytes: int | None = None
) -> "Mirror":
    """The mirror of what lies below `url`, described by the object `first`, which is fetched.

    `place` is the folder for mirrors (None: `default_place()`), `most_bytes` the limit of all
    mirrors in it (None: half of what is free there or held by them).

    FileNotFoundError if there is no object `first`. StoreError for a bucket or place that cannot be
    used.
    """
    data = open_store(url).get(first)
    return _mirror(url, {first: data}, place, most_bytes)


def working_mirror(url: str) -> "Mirror":
    """The mirror for who writes below `url`: one folder, whatever lies there now. StoreError."""
    return _mirror(url, {}, None, None)


def _mirror(
    url: str, first: Mapping[str, bytes], place: Path | None, most_bytes: int | None
) -> "Mirror":
    """The mirror that begins with the objects `first`."""
    root = (place or default_place()).absolute() / _ROOT.format(os.getuid())
    name = url.rstrip("/").rpartition("/")[2]
    described = b"".join(first.values())
    identity = hashlib.sha256(url.encode() + b"\0" + described).hexdigest()[:16]
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.is_symlink() or root.stat().st_uid != os.getuid():
            raise StoreError(f"{root}: the folder for mirrors belongs to somebody else")
        folder = root / f"{name}-{identity}"
        folder.mkdir(mode=0o700, exist_ok=True)
        mirror = Mirror(url, folder, most_bytes or _half_of(root))
        for key, data in first.items():
            mirror.keep(key, data)
        return mirror
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"{root}: no mirror can be made there: {error.strerror}. Give another place"
        ) from None


def _half_of(root: Path) -> int:
    return (shutil.disk_usage(root).free + sum(found.bytes for found in _held(root))) // 2


class Mirror:
    """Files of one address. Threads may share it; a copy in another process opens its own files."""

    def __init__(self, url: str, folder: Path, most_bytes: int):
        """`folder` holds `files` and `maps`; its parent is the place that `most_bytes` is for."""
        self.url, self.folder, self.most_bytes = url, folder, most_bytes
        self.files = folder / _FILES
        self._handles: weakref.WeakValueDictionary[Path, MirroredFile] = (
            weakref.WeakValueDictionary()
        )
        self._lock = threading.Lock()
        self._since = most_bytes
        self.process = os.getpid()
        self.by_content = False
        """Whether objects with data are named by their content."""
        self.requests = self.bytes = 0
        """Requests for objects, and bytes of their answers, of this process."""

    def __reduce__(self) -> tuple:
        state = {"by_content": self.by_content}
        return type(self), (self.url, self.folder, self.most_bytes), state

    @cached_property
    def _store(self) -> Store:
        return open_store(self.url)

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """The threads that fetch."""
        return ThreadPoolExecutor(_REQUESTS, thread_name_prefix="decant-mirror")

    @cached_property
    def opening(self) -> ThreadPoolExecutor:
        """Threads for tasks that wait for requests, such as opening a file."""
        return ThreadPoolExecutor(_REQUESTS, thread_name_prefix="decant-opening")

    def file(self, path: Path, size: int, *, named: str = "") -> MirroredFile:
        """The sparse file at `path` below `files`, of an object of `size` bytes.

        `named` is the object's key, if it is not the path.
        """
        path = self._inside(path)
        with self._lock:
            handle = self._handles.get(path)
            if handle is None:
                key = self._key(path)
                handle = MirroredFile(
                    path,
                    self.folder / _MAPS / key,
                    size=size,
                    get=lambda begin, length: self._get(named or key, begin, length),
                    pool=self.pool,
                )
                self._handles[path] = handle
            return handle

    def whole(self, path: Path, *, sha256: str | None = None, named: str = "") -> Path:
        """`path` below `files`, fetched if it is not there or has another `sha256`; it stays.

        If the bucket lacks it, it is not there afterwards either. `named` as for `file`.
        """
        path = self._inside(path)
        with contextlib.suppress(FileNotFoundError):
            held = path.read_bytes() if sha256 else None
            if path.is_file() and (held is None or hashlib.sha256(held).hexdigest() == sha256):
                return path
        with contextlib.suppress(FileNotFoundError):
            data = self._get(named or self._key(path), sha256=sha256)
            self.keep(self._key(path), data)
        return path

    def now(self, path: Path) -> bytes | None:
        """The bytes that the bucket has now for `path` below `files`; None if it has none."""
        with contextlib.suppress(FileNotFoundError):
            return self._get(self._key(path))
        return None

    def keep(self, key: str, data: bytes) -> None:
        """Write a whole file, all or nothing, unless it is there with these bytes."""
        path = self.files / require_key(key)
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes() == data:
                return
        write_whole(path, data)

    def names(self, folder: str) -> list[str]:
        """Keys below `folder` in the bucket, by a listing: only for what nothing names."""
        return sorted(key for key, _ in self._store.list(folder))

    def _get(
        self, key: str, start: int = 0, length: int | None = None, sha256: str | None = None
    ) -> bytes:
        self._require_own_process()
        data = self._store.get(key, start=start, length=length, sha256=sha256)
        with self._lock:
            self.requests += 1
            self.bytes += len(data)
            self._since += len(data)
            due = self._since > self.most_bytes // 64
            self._since = 0 if due else self._since
        if due:
            _evict(self.folder.parent, self.most_bytes)
        return data

    def _require_own_process(self) -> None:
        """RuntimeError in a forked process, which lacks the threads of the client."""
        if self.process != os.getpid():
            raise RuntimeError(
                f"{self.url}: opened by another process, which was forked since. Start workers "
                'with "spawn", such as DataLoader(…, multiprocessing_context="spawn")'
            )

    def _key(self, path: Path) -> str:
        return require_key(self._inside(path).relative_to(self.files).as_posix())

    def _inside(self, path: Path) -> Path:
        """The path without `..`, by which a merged cache leads to others."""
        return Path(os.path.normpath(path)) if ".." in path.parts else path


def _held(root: Path) -> Iterator[_Found]:
    """Mirrored files of a place, with the time of their last use and the bytes that they take."""
    for folder in root.glob("*"):
        for inside, _, names in os.walk(folder / _MAPS):
            files = folder / _FILES / Path(inside).relative_to(folder / _MAPS)
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    found = (files / name).lstat()
                    marks = Path(inside) / name
                    yield _Found(found.st_mtime_ns, found.st_blocks * 512, files / name, marks)


def _evict(root: Path, most_bytes: int) -> None:
    """Delete the files that were not used for longest, until all take a sixteenth less than most.

    Files that somebody reads now stay.
    """
    files = sorted(_held(root))
    total = sum(found.bytes for found in files)
    if total <= most_bytes:
        return
    for found in files:
        if total <= most_bytes - most_bytes // 16:
            return
        if _delete(found):
            total -= found.bytes


def _delete(found: _Found) -> bool:
    try:
        descriptor = os.open(found.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:  # else another process deleted it, and may have a new one
            found.path.unlink(missing_ok=True)
            found.marks.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
