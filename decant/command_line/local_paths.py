"""Refuses settings that are addresses such as `gs://bucket/cache`: all files are local.

Without this check pathlib would make a folder called `gs:` in the working directory.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

IS_PATH = {"is_path": True}
"""Metadata of a dataclass field that is text and holds a path, or several. Fields of type Path need
no metadata."""
# pathlib turns `gs://b` into `gs:/b`. One letter is a drive of Windows.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")


def require_local_paths(settings: Any) -> None:
    """ValueError that names the first setting of a dataclass, or of one inside it, which is an
    address."""
    for name, path in _paths(settings):
        require_local(str(path), name=name)


def require_local(path: str, *, name: str) -> None:
    """ValueError if `path` is an address; `name` is the setting in the error."""
    if address := _ADDRESS.match(path):
        shown = f"{address[1]}://{path[address.end() :]}"
        raise ValueError(
            f"{name} is {shown}: {address[1]}:// cannot be read or written. Give a path on this "
            "machine, such as a mounted folder"
        )


def _paths(value: Any, *, name: str = "", is_path: bool = False) -> Iterator[tuple[str, Any]]:
    """(name, value) of all paths in a setting's value."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            inside, marked = getattr(value, field.name), "is_path" in field.metadata
            dot = "." if name else ""
            yield from _paths(inside, name=f"{name}{dot}{field.name}", is_path=marked)
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            table = f"{name}[{number}]" if dataclasses.is_dataclass(item) else name
            yield from _paths(item, name=table, is_path=is_path)
    elif isinstance(value, Path) or (is_path and isinstance(value, str)):
        yield name, value
