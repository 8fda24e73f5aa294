"""Refuses settings that are addresses such as `gs://bucket/cache`: all files are local.

Without this check pathlib would make a folder called `gs:` in the working directory.
"""

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

IS_PATH = {"is_path": True}
"""Metadata of a dataclass field that is text and holds a path, or several. Fields of type Path need
no metadata."""
IS_MODEL = {**IS_PATH, "is_model": True}
"""Metadata of a text that is a path or a hub id."""
IS_OUTPUT = {"is_output": True}
"""Metadata of a path that the command makes: it need not be there."""
IS_CACHE = {"holds": ("cache",)}
IS_RUN = {"holds": ("run",)}
IS_RUN_OR_SWEEP = {"holds": ("run", "sweep")}
"""Metadata of a path of a directory that holds one of these, if it is there."""
# pathlib turns `gs://b` into `gs:/b`. One letter is a drive of Windows.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")


def require_local_paths(settings: Any) -> None:
    """ValueError that names the first setting of a dataclass, or of one inside it, which is an
    address."""
    for name, path in paths_in(settings):
        require_local(str(path), name=name)


def require_local(path: str, *, name: str) -> None:
    """ValueError if `path` is an address; `name` is the setting in the error."""
    if address := _ADDRESS.match(path):
        shown = f"{address[1]}://{path[address.end() :]}"
        raise ValueError(
            f"{name} is {shown}: {address[1]}:// cannot be read or written. Give a path on this "
            "machine, such as a mounted folder"
        )


def is_address(text: str) -> bool:
    """Whether the text is an address such as `gs://bucket/cache`."""
    return bool(_ADDRESS.match(text))


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


def paths_in(value: Any, *, name: str = "", is_path: bool = False) -> Iterator[tuple[str, Any]]:
    """(name, value) of all paths in a setting's value."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            inside, marked = getattr(value, field.name), "is_path" in field.metadata
            dot = "." if name else ""
            yield from paths_in(inside, name=f"{name}{dot}{field.name}", is_path=marked)
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            table = f"{name}[{number}]" if dataclasses.is_dataclass(item) else name
            yield from paths_in(item, name=table, is_path=is_path)
    elif isinstance(value, Path) or (is_path and isinstance(value, str)):
        yield name, value
