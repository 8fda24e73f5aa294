"""Finds the files that a glob matches, and every path that may hide one: no corpus gets shorter.

Python's glob leaves out links that lead nowhere and folders that cannot be read.
"""

import fnmatch
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

_MAGIC = "*?["
_FOLDERS = "**"

Refuse = Callable[[str, str], None]
"""Called with the path of what cannot be read and the problem; may raise."""


@dataclass(frozen=True)
class Match:
    """A file that a glob matches."""

    name: str
    """Path below the directory before the glob's first wildcard. Links in it are not followed,
    because a link's target may have another suffix, or none."""
    path: str
    """Absolute path or address, of which `name` is the end."""
    real: str
    """Path of the file after all links; an address as it is."""
    bytes: int
    modified: int | None = None
    """Modification time of a local file, in nanoseconds."""
    version: str = ""
    """Of a file at an address: what changes with its content, such as an ETag."""
    sha256: str = ""
    """Of a file at an address whose server knows it; else empty."""


def matching_files(pattern: str, *, refuse: Refuse) -> list[Match]:
    """The files that `pattern` matches, each once: first those without a link, then by name.

    `*`, `?` and `[…]` match names that do not begin with a dot; the part `**` matches folders
    inside folders. Links to folders are followed. `refuse` gets every path that matches, or may
    hold matching files, and cannot be read.
    """
    parts = Path(pattern).parts
    first = first_wildcard(parts)
    return _found(Path(*parts[:first]).resolve(), parts[first:], refuse)


def first_wildcard(parts: Sequence[str]) -> int:
    """Number of the first part of a glob that has a wildcard; without one, of the last part."""
    return next((i for i, part in enumerate(parts) if is_wildcard(part)), len(parts) - 1)


def matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the path of `names`, folders and a file, is matched by the glob of `parts`.

    By the rules of `matching_files`, for files that are listed in another way.
    """
    if not parts or not names:
        return not parts and not names
    part, rest = parts[0], parts[1:]
    if part != _FOLDERS:
        hidden = names[0].startswith(".") and not part.startswith(".")
        same = fnmatch.fnmatchcase(names[0], part) if is_wildcard(part) else names[0] == part
        return same and not (hidden and is_wildcard(part)) and matches(names[1:], rest)
    into_folder = len(names) > 1 and not names[0].startswith(".")
    return matches(names, rest or ("*",)) or (into_folder and matches(names[1:], parts))


def files_below(folder: Path, *, refuse: Refuse, passed_over: Refuse) -> list[Match]:
    """As `matching_files`, all files below `folder`. `passed_over` gets the hidden ones."""
    for where, folders, files in os.walk(folder):
        for name in sorted(n for n in (*folders, *files) if n.startswith(".")):
            passed_over((Path(where) / name).relative_to(folder).as_posix(), "hidden")
        folders[:] = [name for name in folders if not name.startswith(".")]
    return _found(folder.resolve(), (_FOLDERS,), refuse)


def _found(root: Path, parts: tuple[str, ...], refuse: Refuse) -> list[Match]:
    refused: set[Path] = set()  # a folder is read for `**` and again for the part after it

    def refuse_once(path: Path, problem: str) -> None:
        if path not in refused:
            refused.add(path)
            refuse(os.fsencode(path).decode(errors="backslashreplace"), problem)

    paths = set(_below(root, parts, (), refuse_once))
    resolved = cache(Path.resolve)
    found = [
        local_match(
            path.relative_to(root).as_posix(),
            path,
            real=path.resolve() if path.is_symlink() else resolved(path.parent) / path.name,
        )
        for path in paths
    ]
    return sorted(found, key=lambda match: (match.path != match.real, match.name))


def local_match(name: str, path: Path, *, real: Path) -> Match:
    """The match of a file of this machine."""
    stat = path.stat()
    return Match(name, str(path), str(real), stat.st_size, modified=stat.st_mtime_ns)


def ignore(path: str, problem: str) -> None:
    """Do nothing."""


def fail(path: str, problem: str) -> NoReturn:
    """Raise ValueError: a corpus with `on_error = "fail"` has a path that cannot be read."""
    raise ValueError(f'{path}: {problem}. Repair or remove it, or set corpus.on_error = "skip".')


def _below(
    folder: Path,
    parts: tuple[str, ...],
    inside: tuple[Path, ...],
    refuse: Callable[[Path, str], None],
) -> Iterator[Path]:
    """Files below `folder` that match `parts`.

    `inside` are the folders that `**` came through, after all links. A link to one of them would
    lead round in a circle.
    """
    part, rest = parts[0], parts[1:]
    if part == _FOLDERS:
        real = folder.resolve()
        if real in inside:
            return
        yield from _below(folder, rest or ("*",), inside, refuse)
        part, rest, inside = "*", parts, (*inside, real)
    for path in _entries(folder, part, refuse) if is_wildcard(part) else [folder / part]:
        mode = _mode(path, refuse)
        if rest and stat.S_ISDIR(mode):
            yield from _below(path, rest, inside, refuse)
        elif not rest and mode and not stat.S_ISDIR(mode):
            if problem := _problem(path, mode):
                refuse(path, problem)
            else:
                yield path


def _entries(folder: Path, part: str, refuse: Callable[[Path, str], None]) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        refuse(folder, f"this folder cannot be read: {error.strerror}")
        return []
    hidden = part.startswith(".")
    return [folder / n for n in fnmatch.filter(names, part) if hidden or n[0] != "."]


def _mode(path: Path, refuse: Callable[[Path, str], None]) -> int:
    """The mode of what the path leads to; 0 if nothing is there, or if that cannot be told."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            refuse(path, "this link leads nowhere")
    except OSError as error:
        refuse(path, f"cannot be read: {error.strerror}")
    return 0


def _problem(path: Path, mode: int) -> str:
    """Why the file cannot be read; empty if it can."""
    if not stat.S_ISREG(mode):
        return "a pipe, a socket or a device; write its content to a file"
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "this name is not UTF-8; rename the file"
    return "" if os.access(path, os.R_OK) else "no permission to read this file"


def is_wildcard(part: str) -> bool:
    """Whether a part of a glob has a wildcard."""
    return any(sign in part for sign in _MAGIC)
