"""Copies a sealed cache between directories and buckets, file by file as its manifest names them.

The manifest is written last, so a copy that was stopped is no cache. What is already there with the
right bytes is not sent again. A copy in a bucket has data that are named by their content, so that
commands can change it there; a copy on a disk has the names and the manifest of a capture there.
"""

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from decant.pipelines.upkeep.read_ahead import ReadAhead
from decant.progress import progress
from decant.schemas.disk.atomic import json_bytes
from decant.schemas.disk.layout import MANIFEST, ROWS, STATISTICS, TOKENIZER, TOKENIZER_FILES
from decant.schemas.disk.locks import changing
from decant.schemas.manifest.cache_files import CacheFile, cache_files, claims, commit_keys
from decant.schemas.manifest.manifest import (
    Manifest,
    manifest_named,
    parse_manifest,
    read_manifest,
)
from decant.store import Store, StoreError, open_store, url_of
from decant.store.posix import PosixStore

Item = TypeVar("Item")
_AT_ONCE = 4
"""Files under way. Each is held in memory, and a unit may have 300 MB."""
_COMMITS_AT_ONCE = 16


@dataclass(frozen=True)
class Copied:
    """What a copy did."""

    manifest: Manifest
    files: int
    """Files of the cache, the manifest included."""
    sent: int
    """Those that were written; the others were there."""
    bytes_sent: int


def copy(source: str | Path, target: str | Path, *, console: Console | None = None) -> Copied:
    """Copy the sealed cache at `source` to `target`; each is a directory or a bucket's address.

    ValueError if `source` is no sealed cache or a merged one, if a file of it is damaged, or if
    something else lies at `target`. StoreError if a bucket cannot be used. Run again after an
    error: only what is missing is sent.
    """
    source, target = url_of(source) or Path(source), url_of(target) or Path(target)
    if not isinstance(source, str):
        read_manifest(source, by_content=True)  # its errors say what is wrong with a directory
    origin = open_store(source)
    try:
        sealed = origin.get(MANIFEST)
    except FileNotFoundError:
        raise ValueError(f"{source}: not a sealed cache, there is no {MANIFEST} in it") from None
    manifest = parse_manifest(sealed, where=f"{source}/{MANIFEST}")
    _require_own_parts(manifest, source)
    if not isinstance(target, str) and not isinstance(source, str):
        _require_apart(source, target)
    with contextlib.nullcontext() if isinstance(target, str) else changing(target):
        job = _Copy(origin, open_store(target, writing=True), manifest, sealed)
        return job.run(console)


def _require_own_parts(manifest: Manifest, source: str | Path) -> None:
    others = [part.path for part in manifest.parts if part.in_other_cache]
    if others:
        raise ValueError(
            f"{source}: a merged cache, whose part {others[0]} lies in another cache. Copy the "
            "caches that it was merged from, and merge the copies"
        )


def _require_apart(source: Path, target: Path) -> None:
    inner, outer = target.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise ValueError(f"{target}: lies in {source} or around it; name another directory")


class _Copy:
    """One copy: where from, where to, and what was done."""

    def __init__(self, source: Store, target: Store, manifest: Manifest, sealed: bytes):
        self.source = source
        self.target = target
        self.manifest = manifest
        self.by_content = not isinstance(target, PosixStore)
        self.statistics: dict[str, str] = {}
        """Keys of statistics that the target's disk has, by their hashes."""
        same = self.by_content == manifest.by_content
        self.sealed = sealed if same else manifest_named(sealed, by_content=self.by_content)

    def run(self, console: Console | None) -> Copied:
        """Claim the target, send the files, seal."""
        held = self._held()
        claimed = [self._claim(file, replace=held is not None) for file in self._claims()]
        if held not in (None, self.sealed):
            # Its files are replaced one by one, so from here on it is no cache.
            self.target.delete(MANIFEST)
            held = None
        if self.by_content:
            self._send_tokenizer_names()
        units = sum(len(part.units) for part in self.manifest.parts)
        with progress("copy", total=units, unit="units", console=console) as count:
            sizes = [*claimed]
            # Both generators end here, also by an error. The garbage collector may run in any
            # thread; if it ended them, it would wait in that one for the threads of their pools.
            with (
                contextlib.closing(self._files()) as files,
                contextlib.closing(_in_parallel(self._send, files)) as sizes_of,
            ):
                for file, size in sizes_of:
                    sizes.append(size)
                    count.add(f"/{ROWS}/" in file.key)
        if held is None and not self.target.create(MANIFEST, self.sealed):
            raise ValueError(f"{self.target.url}: another cache was sealed there meanwhile")
        sent = [size for size in sizes if size is not None] + [len(self.sealed)] * (held is None)
        return Copied(self.manifest, len(sizes) + 1, len(sent), sum(sent))

    def _held(self) -> bytes | None:
        """The target's manifest. ValueError if it is of another cache."""
        try:
            held = self.target.get(MANIFEST)
        except FileNotFoundError:
            return None
        there = parse_manifest(held, where=f"{self.target.url}/{MANIFEST}")
        if not set(there.rows_ids) <= set(self.manifest.rows_ids):
            raise ValueError(
                f"{self.target.url}: holds another cache, {there.cache_id[:12]}, with rows that "
                f"{self.source.url} lacks. Choose another place"
            )
        return held

    def _claims(self) -> Iterator[CacheFile]:
        return claims(self.manifest, self._read)

    def _claim(self, file: CacheFile, *, replace: bool) -> int | None:
        """Write what says which capture a part's directory is for, as `_send` does.

        ValueError if it is taken.
        """
        if replace:
            return self._send(file)
        data = self._read(file.key)
        is_there = self.target.head(file.key) is not None
        if not self.target.create(file.key, data):
            raise ValueError(
                f"{self.target.url}/{file.key}: belongs to another capture, which has not "
                "finished. Choose another place, or delete it"
            )
        return None if is_there else len(data)

    def _files(self) -> Generator[CacheFile, None, None]:
        with ThreadPoolExecutor(_COMMITS_AT_ONCE) as pool:
            read = ReadAhead(self._read, commit_keys(self.manifest), pool)
            try:
                yield from cache_files(self.manifest, read)
            finally:
                pool.shutdown(cancel_futures=True)
        yield from self._unnamed_tokenizer

    @cached_property
    def _unnamed_tokenizer(self) -> list[CacheFile]:
        """Files of the tokenizer in a cache that was begun before release 0.8, which wrote no
        hashes of them: all that lie there."""
        if self.manifest.tokenizer_files:
            return []
        keys = [key for key, _ in self.source.list(TOKENIZER)]
        return [CacheFile(key, _sha256(self._read(key))) for key in keys]

    def _send_tokenizer_names(self) -> None:
        """Who goes on with the capture in the bucket finds the tokenizer's files by them."""
        named = dict(self.manifest.tokenizer_files)
        named |= {f.key.removeprefix(f"{TOKENIZER}/"): f.sha256 for f in self._unnamed_tokenizer}
        self.target.put(TOKENIZER_FILES, json_bytes({"files": named}))

    def _read(self, key: str) -> bytes:
        return self._sound(lambda: self.source.get(key))

    def _send(self, file: CacheFile) -> int | None:
        """Write a file, unless it is there; the bytes that were written, or None."""
        if isinstance(self.target, PosixStore):
            return self._to_disk(file, self.target)
        there = file.object(by_content=self.by_content)
        head, data = self.target.head(there), self._data(file)
        if head and head.md5 == hashlib.md5(data, usedforsecurity=False).hexdigest():
            return None
        self.target.put(there, data)
        return len(data)

    def _to_disk(self, file: CacheFile, disk: PosixStore) -> int | None:
        """`_send` to a disk, where parts share the files of equal statistics."""
        is_statistic = Path(file.key).parent.name == STATISTICS
        equal = self.statistics.get(file.sha256) if is_statistic else None
        written: int | None = 0
        if disk.head(file.key) and _sha256(disk.get(file.key)) == file.sha256:
            written = None
        elif not equal or not disk.link(equal, file.key):
            data = self._data(file)
            disk.put(file.key, data)
            written = len(data)
        if is_statistic:
            self.statistics[file.sha256] = file.key
        return written

    def _data(self, file: CacheFile) -> bytes:
        here = file.object(by_content=self.manifest.by_content)
        return self._sound(lambda: self.source.get(here, length=file.bytes, sha256=file.sha256))

    def _sound(self, read: Callable[[], bytes]) -> bytes:
        """What `read` returns; ValueError if a file of a directory is missing or damaged."""
        try:
            return read()
        except (FileNotFoundError, StoreError) as error:
            if not isinstance(self.source, PosixStore):
                raise
            raise ValueError(
                f"{error}. `decant verify {self.source.url}` says what else is damaged"
            ) from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _in_parallel(
    act: Callable[[CacheFile], Item], files: Iterable[CacheFile]
) -> Generator[tuple[CacheFile, Item], None, None]:
    """(file, what `act` returns), in order, with a few under way; after an error no more begin."""
    waiting: deque[tuple[CacheFile, Future[Item]]] = deque()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            for file in files:
                waiting.append((file, pool.submit(act, file)))
                while len(waiting) > 2 * _AT_ONCE:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
