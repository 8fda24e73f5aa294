"""Files of datasets on the Hugging Face hub: listed at a commit, read by range.

What was fetched stays below HF_HOME and is used again, also offline: answers about a commit, and
blocks of files. A file that Hugging Face's own tools have fetched whole is read from their cache.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decant.pipelines.rows.hub_address import HubAddress
from decant.pipelines.rows.remote_file import RemoteFile
from decant.store.whole_file import write_whole

BLOCK = 8 << 20
"""Bytes fetched at once."""
_KIND = "dataset"


def pinned(asked: HubAddress) -> HubAddress:
    """The address with the commit that its revision is now.

    Offline (HF_HUB_OFFLINE=1, or no network) the commit is the one that was last seen here.
    FileNotFoundError if the dataset or revision does not exist or cannot be reached.
    """
    if asked.is_pinned:
        return asked
    memory = _memory(asked.repo) / f"revision-{_name(asked.revision or 'main')}.json"
    try:
        with _told(asked):
            from huggingface_hub import HfApi

            commit = HfApi().dataset_info(asked.repo, revision=asked.revision).sha
            _remember(memory, commit)
    except Unreachable:
        commit = _remembered(memory) or _snapshot_commit(asked)
        if not commit:
            raise
    return dataclasses.replace(asked, revision=commit)


def files_at(asked: HubAddress) -> list[RemoteFile]:
    """The file at a pinned address, or all files of the folder there; none if nothing is there."""
    memory = _memory(asked.repo) / f"files-{_name(str(asked))}.json"
    listed = _remembered(memory)
    if listed is None:
        try:
            with _told(asked):
                listed = _listed(asked)
                _remember(memory, listed)
        except Unreachable:
            listed = _fetched_before(asked)
            if not listed:
                raise
    return [
        RemoteFile(str(dataclasses.replace(asked, path=path)), size, version, sha256)
        for path, size, version, sha256 in listed
        if ".." not in path.split("/")
    ]


def read(file: RemoteFile, start: int, length: int) -> bytes:
    """The bytes [start, start + length) of a file, which ends no earlier."""
    address = HubAddress.parse(file.url)
    if whole := _whole_file(address):
        with whole.open("rb") as local:
            local.seek(start)
            return local.read(length)
    end = start + length
    blocks = [_block(file, number) for number in range(start // BLOCK, -(-end // BLOCK))]
    skipped = start - start // BLOCK * BLOCK
    return b"".join(blocks)[skipped : skipped + length]


class Unreachable(FileNotFoundError):
    """The hub cannot be reached."""


def _listed(asked: HubAddress) -> list[tuple[str, int, str, str]]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api, at = HfApi(), {"revision": asked.revision, "repo_type": _KIND}
    entries: list[Any] = api.get_paths_info(asked.repo, [asked.path], **at) if asked.path else []
    if not (entries and isinstance(entries[0], RepoFile)):
        if asked.path and not entries:
            return []
        tree = api.list_repo_tree(asked.repo, asked.path or None, recursive=True, **at)
        entries = [entry for entry in tree if isinstance(entry, RepoFile)]
    return [(e.path, e.size, e.blob_id, e.lfs.sha256 if e.lfs else "") for e in entries]


def _snapshot(asked: HubAddress) -> Path | None:
    """The folder in which Hugging Face's tools keep what they fetched of this revision."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                asked.repo, revision=asked.revision, repo_type=_KIND, local_files_only=True
            )
        )
    except (errors.HFValidationError, OSError, ValueError):
        return None


def _snapshot_commit(asked: HubAddress) -> str:
    snapshot = _snapshot(asked)
    return snapshot.name if snapshot else ""


def _fetched_before(asked: HubAddress) -> list[tuple[str, int, str, str]]:
    """The files in the cache of Hugging Face's tools, if the user says that there are no others."""
    from huggingface_hub import constants

    snapshot = _snapshot(asked) if constants.HF_HUB_OFFLINE else None
    if snapshot is None:
        return []
    at = snapshot / asked.path
    files = [at] if at.is_file() else [path for path in sorted(at.rglob("*")) if path.is_file()]
    blobs = [file.resolve().name for file in files]  # of large files the sha256
    return [
        (file.relative_to(snapshot).as_posix(), file.stat().st_size, blob, blob * (len(blob) == 64))
        for file, blob in zip(files, blobs, strict=True)
    ]


def _whole_file(address: HubAddress) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        address.repo, address.path, revision=address.revision, repo_type=_KIND
    )
    return Path(found) if isinstance(found, str) else None


@functools.lru_cache(maxsize=4)
def _block(file: RemoteFile, number: int) -> bytes:
    start = number * BLOCK
    size = min(BLOCK, file.bytes - start)
    kept = _home() / "blocks" / _name(file.url) / f"{number:06d}"
    with contextlib.suppress(OSError):
        data = kept.read_bytes()
        if len(data) == size:
            return data
    address = HubAddress.parse(file.url)
    with _told(address):
        data = _fetched(address, start, size)
    if len(data) != size:
        raise RuntimeError(f"{file.url}: {len(data)} bytes came where {size} were asked for")
    _write(kept, data)
    return data


def _fetched(address: HubAddress, start: int, size: int) -> bytes:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    url = hf_hub_url(address.repo, address.path, revision=address.revision, repo_type=_KIND)
    response = http_backoff(
        "GET",
        url,
        headers={"Range": f"bytes={start}-{start + size - 1}", **build_hf_headers()},
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        follow_redirects=True,
    )
    hf_raise_for_status(response)
    # A server that ignores ranges sends the whole file.
    return response.content if response.status_code == 206 else response.content[start:][:size]


@contextlib.contextmanager
def _told(address: HubAddress) -> Iterator[None]:
    """Raises the client's errors in our words: FileNotFoundError, Unreachable or RuntimeError."""
    from huggingface_hub import errors

    where = str(address)
    no_answer = (vars(errors)["HTTPError"], OSError)  # the first is of its client library
    try:
        yield
    except errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"{where}: this dataset is gated: accept its terms on its page, then log in "
            "(`hf auth login`, or HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{where}: no branch, tag or commit of this name") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{where}: no dataset of this name on the hub that you can see. A private one needs a "
            "login (`hf auth login`, or HF_TOKEN)"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{where}: no such file in the dataset") from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        first = next(filter(None, str(error).splitlines()), type(error).__name__)
        raise RuntimeError(f"{where}: the hub refuses it: {first}") from error
    except no_answer as error:
        raise Unreachable(
            f"{where}: the hub cannot be reached (or HF_HUB_OFFLINE is set), and this was not "
            "fetched before. Fetch it where there is a network (`hf download --repo-type dataset "
            f"{address.repo}`) and copy the cache in HF_HOME"
        ) from error


def _home() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "decant"


def _memory(repo: str) -> Path:
    return _home() / "datasets" / repo.replace("/", "--")


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _remembered(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _remember(path: Path, value: Any) -> None:
    _write(path, json.dumps(value).encode())


def _write(path: Path, data: bytes) -> None:
    """Write a file of the cache. If the disk is full or read-only, it is fetched again."""
    with contextlib.suppress(OSError):
        write_whole(path, data)
