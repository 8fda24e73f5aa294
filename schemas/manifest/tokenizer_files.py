"""The files in a cache's `tokenizer/`, and their hashes for the manifest."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from decant.schemas.disk import inside
from decant.schemas.disk.atomic import read_json, write_bytes, write_json
from decant.schemas.disk.identity import file_sha256
from decant.schemas.disk.layout import TOKENIZER, TOKENIZER_FILES
from decant.schemas.disk.stand_in import bucket_of, exists
from decant.store.base import require_key
from decant.store.whole_file import write_whole

_MOST_BYTES = 512 << 20
"""Most bytes of the files in `tokenizer/`; the largest known tokenizers have a tenth."""


def tokenizer_files(cache: Path) -> dict[str, bytes]:
    """Contents of the files in `tokenizer/` by name; links and devices are left out.

    Commands copy these files to other places, so a link to a private file must not be followed.
    ValueError if they are too large or the directory is a link; FileNotFoundError if there is none.
    """
    if bucket_of(cache):
        return {name: _named_file(cache, name, sha) for name, sha in _named_files(cache).items()}
    return inside.regular_files(cache, Path(TOKENIZER), most=_MOST_BYTES)


def tokenizer_hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    """sha256 of each file by name, given the contents by name."""
    return {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}


def write_tokenizer_files(cache: Path, files: Mapping[str, bytes]) -> None:
    """Write files to `tokenizer/`, by name; in a bucket their names and hashes too, last."""
    for name, content in files.items():
        write_bytes(cache / TOKENIZER / name, content, within=cache)
    if bucket_of(cache):
        write_json(cache / TOKENIZER_FILES, {"files": tokenizer_hashes(files)})


def has_tokenizer(cache: Path) -> bool:
    """Whether the cache has its tokenizer."""
    return exists(cache / TOKENIZER_FILES) if bucket_of(cache) else (cache / TOKENIZER).is_dir()


def tokenizer_folder(cache: Path) -> Path:
    """A folder on this machine with the files of `tokenizer/`."""
    if (bucket := bucket_of(cache)) is None:
        return cache / TOKENIZER
    folder = bucket.scratch / TOKENIZER
    for name, sha256 in _named_files(cache).items():
        file = folder / name
        if not file.is_file() or file_sha256(file) != sha256:
            write_whole(file, _named_file(cache, name, sha256))
    return folder


def _named_files(cache: Path) -> dict[str, str]:
    """sha256 by name of the files in `tokenizer/` of a cache in a bucket."""
    named = read_json(cache / TOKENIZER_FILES, holds="files")["files"]
    return {require_key(name): sha256 for name, sha256 in named.items()}


def _named_file(cache: Path, name: str, sha256: str) -> bytes:
    data = inside.read_regular(cache / TOKENIZER / name)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{cache / TOKENIZER / name}: is not the file that was written")
    return data
