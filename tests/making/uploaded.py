"""Puts a directory into a bucket, file by file, under the same names."""

from pathlib import Path

from decant.store import open_store


def upload(directory: Path, url: str) -> str:
    """The address, after all files of `directory` were written below it."""
    store = open_store(url)
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            store.put(path.relative_to(directory).as_posix(), path.read_bytes())
    return url
