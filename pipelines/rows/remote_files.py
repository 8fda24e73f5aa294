"""Corpus files in buckets and on the hub: which a glob matches, and how they are read."""

import functools
import io
from functools import partial

from decant.pipelines.rows import hub_dataset
from decant.pipelines.rows.hub_address import SCHEME, HubAddress
from decant.pipelines.rows.matching import Match, Refuse, first_wildcard, is_wildcard, matches
from decant.pipelines.rows.remote_file import BUFFER, RangeFile, Read, RemoteFile, SequentialFile
from decant.store import ChangedError, open_store
from decant.store.objects import ObjectStore
from decant.store.urls import BUCKETS, require_scheme

SCHEMES = (*BUCKETS, "hf")
"""Schemes of the addresses from which a corpus is read."""


def matching_remote(pattern: str, *, passed_over: Refuse) -> tuple[list[Match], bool]:
    """The files that a glob, a folder or a file at an address matches, by name; and whether it is a
    folder, of which not all files need be texts.

    Globs mean what they mean in `matching_files`. `passed_over` gets what is hidden in a folder.
    ValueError for another scheme. StoreError, FileNotFoundError or RuntimeError if the place cannot
    be reached or refuses.
    """
    require_scheme(pattern, SCHEMES, name="corpus.files")
    root, parts = _split(pattern)
    found = sorted(_files_at(root), key=lambda file: file.url)
    if parts:
        chosen = [f for f in found if matches(_names(f, root), parts)]
        return [_match(file, root) for file in chosen], False
    if [file.url for file in found] == [root]:
        return [_match(found[0], root.rpartition("/")[0])], False
    hidden = {file.url: _hidden(_names(file, root)) for file in found}
    for name in dict.fromkeys(filter(None, hidden.values())):
        passed_over(name, "hidden")
    return [_match(file, root) for file in found if not hidden[file.url]], True


def place_of(url: str) -> str:
    """The bucket or the dataset, at its commit, that an address leads to."""
    if url.startswith(SCHEME):
        return HubAddress.parse(url).dataset
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def open_sequential(file: RemoteFile, *, until: int | None = None) -> io.BufferedReader:
    """The file's bytes. `until` is the end of those that are wanted, as far as known."""
    return io.BufferedReader(SequentialFile(_reader(file), file, until=until), BUFFER)


def open_ranges(file: RemoteFile) -> RangeFile:
    """The file's bytes for a reader that seeks: without a buffer, each read is one request."""
    return RangeFile(_reader(file), file)


def _reader(file: RemoteFile) -> Read:
    if file.url.startswith(SCHEME):
        return partial(hub_dataset.read, file)
    store, key = _place(file.url)
    return partial(_read, store, key, file)


def require_same(file: RemoteFile) -> None:
    """ValueError if there is another file at the address now. A commit of the hub never changes."""
    if file.url.startswith(SCHEME):
        return
    store, key = _place(file.url)
    head = store.head(key)
    if head is None or (head.size, head.etag) != (file.bytes, file.version):
        raise ValueError(f"{file.url}: {'is gone' if head is None else CHANGED}")


CHANGED = (
    "changed while this run read it. Restore the old file and run again, or capture the new one "
    "into another output"
)


def _read(store: ObjectStore, key: str, file: RemoteFile, start: int, length: int) -> bytes:
    try:
        return store.get(key, start=start, length=length, etag=file.version)
    except ChangedError as error:
        raise ValueError(f"{file.url}: {CHANGED}") from error


def _split(pattern: str) -> tuple[str, tuple[str, ...]]:
    """The address before the first wildcard, and the parts of the glob from there on."""
    scheme, _, rest = pattern.partition("://")
    parts = rest.strip("/").split("/")
    first = first_wildcard(parts)
    if not is_wildcard(parts[first]):
        return str(_pinned(f"{scheme}://{'/'.join(parts)}")), ()
    return str(_pinned(f"{scheme}://{'/'.join(parts[:first])}")), tuple(parts[first:])


def _pinned(url: str) -> str:
    return str(hub_dataset.pinned(HubAddress.parse(url))) if url.startswith(SCHEME) else url


def _files_at(root: str) -> list[RemoteFile]:
    """All files below an address, or the one that is there."""
    if root.startswith(SCHEME):
        return hub_dataset.files_at(HubAddress.parse(root))
    store, prefix = _place(root)
    found = [
        RemoteFile(f"{store.url}/{key}", size, etag)
        for key, size, etag in store.entries(prefix)
        if not key.endswith("/")
    ]
    if found or not prefix:
        return found
    head = store.head(prefix)
    return [RemoteFile(root, head.size, head.etag)] if head else []


def _place(url: str) -> tuple[ObjectStore, str]:
    bucket = place_of(url)
    return _store(bucket), url[len(bucket) + 1 :]


@functools.lru_cache(maxsize=16)
def _store(bucket: str) -> ObjectStore:
    store = open_store(bucket)
    assert isinstance(store, ObjectStore), "the scheme was checked"
    return store


def _names(file: RemoteFile, root: str) -> list[str]:
    return file.url[len(root) + 1 :].split("/")


def _hidden(names: list[str]) -> str:
    """The path of the first hidden folder, or of the file if it is hidden; else empty."""
    first = next((at for at, name in enumerate(names) if name.startswith(".")), None)
    return "" if first is None else "/".join(names[: first + 1])


def _match(file: RemoteFile, root: str) -> Match:
    return Match(
        file.url[len(root) + 1 :],
        file.url,
        file.url,
        file.bytes,
        version=file.version,
        sha256=file.sha256,
    )
