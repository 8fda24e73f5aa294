"""Folders of this machine that stand for caches in buckets: where paths below them lead.

All code names the files of a cache by paths. A cache in a bucket gets a folder whose paths stand
for objects; hardly a file is ever there. What reads or writes a file (`atomic.py`, `inside.py`,
`array_record.py`) asks `bucket_of` for the bucket first.

    objects/SHA256[.array_record|.npy]   data, named by their content: written before anything names
                                         them, and never overwritten
    all other paths                      small files: an object's key is the file's path

There is no rename, no lock and no flush. An object is there whole, or not at all.
"""

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from decant.schemas.disk.identity import file_sha256
from decant.schemas.disk.layout import cache_of
from decant.store import is_url, open_store, url_of
from decant.store.mirror import Mirror, working_mirror
from decant.store.mirrored_file import MirroredFile
from decant.store.objects import ObjectStore

Item = TypeVar("Item")
Result = TypeVar("Result")
OBJECTS = "objects"
_DATA = (".array_record", ".npy")
_SHARD = re.compile(r"c(?:\.[0-9]+)+")
_AT_ONCE = 16
"""Requests at once, where many small objects are asked for."""
_LISTED_SECONDS = 10.0
_TRIES = 4
"""Of a range that has other bytes than it should."""


def object_key(path: Path, sha256: str) -> str:
    """The key of the object with the data of the file `path`."""
    return f"{OBJECTS}/{sha256}{path.suffix if path.suffix in _DATA else ''}"


def named_in(mirror: Mirror, path: Path, sha256: str) -> str:
    """The key in the mirror's bucket of the object with the data of `path`, a file of a part.

    Empty if it is the file's path.
    """
    if not mirror.by_content:
        return ""
    cache = Path(os.path.normpath(cache_of(path) or mirror.files))
    return (cache.relative_to(mirror.files) / object_key(path, sha256)).as_posix()


def is_data(path: Path) -> bool:
    """Whether a file of this name has an object that is named by its content."""
    return path.suffix in _DATA or _SHARD.fullmatch(path.name) is not None


class Bucket:
    """A cache at an address, and the folder that stands for it."""

    def __init__(self, url: str):
        self.url = url
        self._mirror = working_mirror(url)
        # Resolved, because paths of a cache are resolved before they go to workers.
        self.root = (self._mirror.folder / "cache").resolve()
        self.scratch = self._mirror.folder / "scratch"
        for folder in (self.root, self.scratch):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        store = open_store(url)
        assert isinstance(store, ObjectStore), url
        self.store = store
        self._listed: dict[str, tuple[float, set[str]]] = {}

    def key(self, path: Path) -> str:
        """The key of a small file."""
        return path.relative_to(self.root).as_posix()

    def address(self, path: Path) -> str:
        """What users call a path below the folder."""
        return f"{self.url}/{self.key(path)}" if path != self.root else self.url

    def read(self, path: Path) -> bytes:
        """The bytes of a small file. FileNotFoundError."""
        return self.store.get(self.key(path))

    def size(self, path: Path, sha256: str) -> int | None:
        """Bytes of the object with a file's data; None if there is none."""
        head = self.store.head(object_key(path, sha256))
        return head.size if head else None

    def data(self, path: Path, *, sha256: str, size: int) -> MirroredFile:
        """The data of a file, fetched when it is read."""
        file = self._mirror.files / object_key(path, sha256)
        return self._mirror.file(file, size)

    def sha256(self, path: Path, sha256: str) -> str | None:
        """The hash that the data of a file really have, read anew; None if there are none."""
        size = self.size(path, sha256)
        if size is None:
            return None
        file = self.data(path, sha256=sha256, size=size)
        with file.held():
            file.forget()
            file.ensure([(0, size)])
            return file_sha256(file.path)

    def whole(self, path: Path, *, sha256: str) -> Path:
        """A file on this machine with the data of `path`, if the bucket has them."""
        return self._mirror.whole(self._mirror.files / object_key(path, sha256), sha256=sha256)

    def send(self, path: Path, data: bytes, *, first: bool) -> bool:
        """Write the object of a file. `first`: leave the one that is there.

        Whether it now holds `data`.
        """
        if is_data(path):
            # Whoever writes this key writes these bytes.
            self.store.put(object_key(path, hashlib.sha256(data).hexdigest()), data)
        elif first:
            return self.store.create(self.key(path), data)
        else:
            self.store.put(self.key(path), data)
        return True

    @contextlib.contextmanager
    def scratch_file(self, path: Path) -> Iterator[Path]:
        """A path on this machine for writing what `send` then sends; deleted afterwards."""
        file = self.scratch / f"{os.getpid()}-{os.urandom(4).hex()}-{path.name}"
        try:
            yield file
        finally:
            file.unlink(missing_ok=True)

    def listed(self, folder: Path) -> set[str]:
        """Names in a folder, as listed within the last seconds."""
        key = self.key(folder)
        asked, names = self._listed.get(key, (0.0, set()))
        if not asked or time.monotonic() - asked > _LISTED_SECONDS:
            below = (found[len(key) + 1 :] for found, _ in self.store.list(key))
            names = {name for name in below if "/" not in name}
            self._listed[key] = time.monotonic(), names
        return names


_buckets: dict[Path, Bucket] = {}
_opening = threading.Lock()


def working_folder(place: str | Path, *, writing: bool = False) -> Path:
    """The folder that stands for the cache at an address; a path on this machine as it is.

    `writing` tries the server's conditional writes first. StoreError if the bucket cannot be used.
    """
    if not is_url(place):
        return Path(place)
    url = str(url_of(place)).rstrip("/")
    if writing:
        open_store(url, writing=True)
    with _opening:
        for bucket in _buckets.values():
            if bucket.url == url:
                return bucket.root
        bucket = Bucket(url)
        _buckets[bucket.root] = bucket
        return bucket.root


def bucket_of(path: Path) -> Bucket | None:
    """The bucket that holds the file `path`; None if it is on this machine."""
    for root, bucket in _buckets.items():
        if path.is_relative_to(root):
            return bucket
    return None


def address_of(path: Path) -> str:
    """What users call a path: an address if it stands for one."""
    bucket = bucket_of(path)
    return bucket.address(path) if bucket else str(path)


@contextlib.contextmanager
def by_address(cache: Path) -> Iterator[None]:
    """Errors of the block name addresses in place of paths below the cache's folder."""
    try:
        yield
    except Exception as error:
        if bucket := bucket_of(cache):
            error.args = tuple(
                arg.replace(str(bucket.root), bucket.url) if isinstance(arg, str) else arg
                for arg in error.args
            )
        raise


class _Sent(NamedTuple):
    """A path on its way to another process: the address of its cache, and the path below it."""

    cache: str
    below: str


class Travels:
    """Its paths may stand for objects. Unpickled elsewhere, they lead there from that machine."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: _sent(value) for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: _arrived(value) for name, value in state.items()})


def _sent(value: Any) -> Any:
    bucket = bucket_of(value) if isinstance(value, Path) else None
    return _Sent(bucket.url, value.relative_to(bucket.root).as_posix()) if bucket else value


def _arrived(value: Any) -> Any:
    return working_folder(value.cache) / value.below if isinstance(value, _Sent) else value


def exists(path: Path) -> bool:
    """Whether there is such a small file."""
    bucket = bucket_of(path)
    return bucket.store.head(bucket.key(path)) is not None if bucket else path.exists()


def version_of(path: Path) -> str:
    """Changes when the file is replaced. FileNotFoundError."""
    if bucket := bucket_of(path):
        head = bucket.store.head(bucket.key(path))
        if head is None:
            raise FileNotFoundError(f"{path}: there is no such object")
        return head.version
    stat = path.stat()
    return f"{stat.st_ino}-{stat.st_mtime_ns}-{stat.st_size}"


def names_in(folder: Path, ending: str) -> set[str]:
    """Names of the files in a folder with this ending, for display and tidying. They decide
    nothing: a bucket's are listed every few seconds only."""
    bucket = bucket_of(folder)
    names = bucket.listed(folder) if bucket else {path.name for path in folder.glob(f"*{ending}")}
    return {name for name in names if name.endswith(ending)}


def again_if_damaged(read: Callable[[], Result], forget: Callable[[], None]) -> Result:
    """What `read` returns. A range has no hash by which the store could see that it changed on the
    way: after a ValueError of `read` it is forgotten and fetched again, a few times."""
    for _ in range(_TRIES - 1):
        try:
            return read()
        except ValueError:
            forget()
    return read()


def each_of(
    function: Callable[[Item], Result], items: Iterable[Item], *, cache: Path
) -> list[Result]:
    """`function` of each item, in order; in threads if the cache is in a bucket."""
    if bucket_of(cache) is None:
        return [function(item) for item in items]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, items))
