"""Identities are hashes: of files, of JSON, and of a cache's rows, teacher and signals."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from decant.store.whole_file import write_whole

_SAVE_SECONDS = 10.0
"""Between two writes of the digests that are made; some files take hours."""


def canonical_json(value: Any) -> bytes:
    """The canonical JSON of `value`: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_memory() -> Path:
    """Path of the user's file that keeps the hashes of large files between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "decant" / "digests.json"


def remembered_sha256s(paths: Sequence[Path], *, memory: Path) -> list[str]:
    """`file_sha256` of each path, cached in the JSON file `memory`.

    The cache's key is (path, size, mtime, ctime, inode).
    """
    keys = [_file_key(path) for path in paths]
    reads = {key: partial(file_sha256, path) for key, path in zip(keys, paths, strict=True)}
    known = remembered_digests(reads, memory=memory)
    return [known[key] for key in keys]


def remembered_digests(
    reads: Mapping[str, Callable[[], str]], *, memory: Path, threads: int | None = None
) -> dict[str, str]:
    """A digest by each key of `reads`: from the JSON file `memory`, or made by calling the value.

    Digests that were made are remembered, also if one of the calls raises. An unwritable `memory`
    is ignored. Weights are tens of gigabytes; a rerun should not read them only to identify them.
    """
    known = recorded_digests(memory)
    new = {key: read for key, read in reads.items() if key not in known}
    if not new:
        return known
    saved = time.monotonic()
    # Hashing releases the GIL.
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        made = {pool.submit(read): key for key, read in new.items()}
        try:
            for done in concurrent.futures.as_completed(made):
                known[made[done]] = done.result()
                if time.monotonic() - saved > _SAVE_SECONDS:
                    _remember(known, memory)
                    saved = time.monotonic()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            _remember(known, memory)
    return known


def recorded_digests(memory: Path) -> dict[str, str]:
    """What the file `memory` holds; nothing if it is missing or damaged."""
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(known: dict[str, str], memory: Path) -> None:
    # If the home directory is read-only or full, as in containers, the next run hashes again.
    with contextlib.suppress(OSError):
        write_whole(memory, json.dumps(known).encode())


def _file_key(path: Path) -> str:
    stat = path.stat()
    # ctime too, because restoring or copying a file can set an old mtime.
    times = f"{stat.st_mtime_ns}:{stat.st_ctime_ns}"
    return f"{path.resolve()}:{stat.st_size}:{times}:{stat.st_ino}"


def rows_id(*, tokenizer: str, rules: Mapping[str, Any], sources: list[tuple[str, str]]) -> str:
    """Identity of a part's rows.

    `tokenizer` is a digest; `rules` are the settings that decide packing and masking; `sources` are
    ordered (name, sha256) pairs.
    """
    return digest({"tokenizer": tokenizer, "rules": dict(rules), "sources": sources})


def teacher_id(
    *, weights: Mapping[str, str], config: Mapping[str, Any], vocabulary: int, numerics: str
) -> str:
    """Identity of what the teacher computes.

    `weights` maps file names to sha256; `config` holds the model config's fields that we honour;
    `vocabulary` is the number of token ids; `numerics` names compute dtype and matmul precision.
    """
    return digest(
        {
            "weights": sorted(weights.values()),
            "config": dict(config),
            "vocabulary": vocabulary,
            "numerics": numerics,
        }
    )


def signal_id(
    *, rows: str, teacher: str, settings: Mapping[str, Any], statistics: Mapping[str, str]
) -> str:
    """Identity of a signal.

    `rows` and `teacher` are ids; `statistics` maps the names of the statistics that encode the
    signal to their sha256.
    """
    return digest(
        {
            "rows": rows,
            "teacher": teacher,
            "settings": dict(settings),
            "statistics": dict(statistics),
        }
    )
