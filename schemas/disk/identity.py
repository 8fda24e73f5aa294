"""Identities are hashes: of files, of JSON, and of a cache's rows, teacher and signals."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


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


def remembered_sha256s(paths: Sequence[Path], *, memory: Path) -> list[str]:
    """`file_sha256` of each path, cached in the JSON file `memory`.

    The cache's key is (path, size, mtime, ctime, inode). An unwritable `memory` is ignored.
    Weights are tens of gigabytes; a rerun should not read them only to identify them.
    """
    try:
        known = json.loads(memory.read_text())
        if not isinstance(known, dict):
            known = {}
    except (OSError, ValueError, RecursionError):
        known = {}
    keys = [_file_key(path) for path in paths]
    new = {key: path for key, path in zip(keys, paths, strict=True) if key not in known}
    if new:
        with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the GIL
            known |= zip(new, pool.map(file_sha256, new.values()), strict=True)
        _remember(known, memory)
    return [known[key] for key in keys]


def _remember(known: dict[str, str], memory: Path) -> None:
    temporary = memory.with_name(f".{memory.name}.{os.getpid()}")
    # If the home directory is read-only or full, as in containers, the next run hashes again.
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(known))
            temporary.replace(memory)
        finally:
            temporary.unlink(missing_ok=True)


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
