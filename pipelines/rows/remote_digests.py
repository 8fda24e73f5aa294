"""sha256 of files at addresses: from the server, or by reading each file once."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from decant.pipelines.rows.remote_file import BUFFER, RemoteFile
from decant.pipelines.rows.remote_files import open_ranges
from decant.schemas.disk.identity import recorded_digests, remembered_digests

_THREADS = 16
"""Files read at once; a single connection seldom fills the link."""


def digest_key(file: RemoteFile) -> str:
    """What stays the same for as long as the file does."""
    return f"{file.url} {file.version} {file.bytes}"


def remote_sha256s(
    files: Sequence[RemoteFile],
    *,
    memory: Path,
    known: Mapping[str, str],
    tell: Callable[[str], None],
) -> dict[str, str]:
    """sha256 of each file by its address.

    The server's if it knows one; else that in `known` or in the file `memory`, by `digest_key`;
    else the file is read, and `memory` keeps what is found. `tell` gets a line before that.
    """
    digests = {file.url: file.sha256 or known.get(digest_key(file), "") for file in files}
    unknown = {digest_key(file): file for file in files if not digests[file.url]}
    if not unknown:
        return digests
    recorded = recorded_digests(memory)
    unread = [file for key, file in unknown.items() if key not in recorded]
    if unread:
        size = sum(file.bytes for file in unread)
        count = f"{len(unread):,} file{'s' * (len(unread) > 1)}"
        tell(f"reading {count} once to identify them: {unread[0].url} …, {size:,} bytes in all")
    reads = {key: partial(_sha256, file) for key, file in unknown.items()}
    made = remembered_digests(reads, memory=memory, threads=_THREADS)
    return digests | {file.url: made[key] for key, file in unknown.items()}


def _sha256(file: RemoteFile) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(BUFFER, file.bytes)))
    opened = open_ranges(file)
    while size := opened.readinto(buffer):
        digest.update(buffer[:size])
    return digest.hexdigest()
