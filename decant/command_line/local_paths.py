"""Which settings are paths, and which of them may be addresses such as `gs://bucket/cache`.

Without this check pathlib would make a folder called `gs:` in the working directory.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from decant.store.urls import BUCKETS, require_scheme, scheme_of, url_of

IS_PATH = {"is_path": True}
"""Metadata of a dataclass field that is text and holds a path, or several. Fields of type Path need
no metadata."""
IS_MODEL = {**IS_PATH, "is_model": True, "schemes": BUCKETS}
"""Metadata of a text that is a path, an address in a bucket or a hub id."""
IS_OUTPUT = {"is_output": True}
"""Metadata of a path that the command makes: it need not be there."""
IN_BUCKETS = {"schemes": BUCKETS}
"""Metadata of a path that may also be an `s3://` or `gs://` address. Where it is of type Path, use
`url_of` on it. Other schemes than these are named in the same way."""
IS_CORPUS = {**IS_PATH, "schemes": (*BUCKETS, "hf")}
"""Metadata of texts that are globs, folders or files, here, in buckets or on the hub."""
IS_CACHE = {"holds": ("cache",)}
IS_RUN = {"holds": ("run",)}
IS_RUN_OR_SWEEP = {"holds": ("run", "sweep")}
"""Metadata of a path of a directory that holds one of these, if it is there."""


def require_possible_paths(settings: Any) -> None:
    """ValueError that names the first setting of a dataclass, or of one inside it, which is an
    address where none of its scheme can be."""
    for name, path, metadata in paths_in(settings):
        require_possible_path(path, name=name, metadata=metadata)


def require_possible_path(
    path: str | Path, *, name: str, metadata: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """ValueError if `path` is an address of a scheme that the field's `metadata` does not allow.

    `name` is the setting in the error.
    """
    allowed = metadata.get("schemes", ())
    if scheme_of(path) in BUCKETS and not allowed:
        raise ValueError(f"{name} is {url_of(path)}: {_not_in_a_bucket(metadata)}")
    require_scheme(path, allowed, name=name)


def _not_in_a_bucket(metadata: Mapping[str, Any]) -> str:
    """Why the path of a field cannot be in a bucket, and what to do."""
    holds = metadata.get("holds", ())
    if "run" in holds:
        return (
            "a run directory cannot be in a bucket, because Orbax does not write checkpoints to "
            "s3://. Give a path on this machine"
        )
    if "cache" in holds:
        if "is_output" in metadata:
            return "a cache cannot be made in a bucket yet. Give a path on this machine"
        return "a cache in a bucket cannot be used here yet. `decant copy` it to this machine first"
    return "this cannot be in a bucket yet. Give a path on this machine, such as a mounted folder"


def without_tilde(text: str) -> str:
    """The path with a home directory in place of `~`, as a shell gives it, which leaves
    `--output=~/x` as it is. `~nobody` stays."""
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        return text


def holds_paths(kind: Any, metadata: Mapping[str, Any]) -> bool:
    """Whether a field of this type and metadata holds a path, or several."""
    return (
        "is_path" in metadata
        or kind is Path
        or any(holds_paths(inside, {}) for inside in typing.get_args(kind))
    )


def paths_in(
    value: Any, *, name: str = "", metadata: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(name, value, its field's metadata) of all paths in a setting's value."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            dot = "." if name else ""
            inside = getattr(value, field.name)
            yield from paths_in(inside, name=f"{name}{dot}{field.name}", metadata=field.metadata)
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            table = f"{name}[{number}]" if dataclasses.is_dataclass(item) else name
            yield from paths_in(item, name=table, metadata=metadata)
    elif isinstance(value, Path) or ("is_path" in metadata and isinstance(value, str)):
        yield name, value, metadata
