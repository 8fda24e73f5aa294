"""Where the files of a Hugging Face directory lie: on this machine, or in a bucket.

From a bucket the small files are copied into a temporary directory; weights are read by range.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from decant.models.checkpoints.file_bytes import LocalFile, RemoteFile, remote_sha256s
from decant.models.checkpoints.hf_layout import ADAPTER_CONFIG, CONFIG, INDEX
from decant.models.checkpoints.safetensors_file import SafetensorsFile
from decant.models.text.named_templates import is_template_file
from decant.models.text.tokenizer import FILES
from decant.schemas.disk.identity import remembered_sha256s
from decant.store import open_store
from decant.store.objects import ObjectStore

_LARGEST = 256 << 20
"""Bytes of a file that is copied; a tokenizer takes about 30 MB."""


class LocalFiles:
    """The weight files of a directory."""

    def __init__(self, path: Path):
        self.path = path
        self.where = str(path)

    def has(self, name: str) -> bool:
        """Whether the directory has a file of this name."""
        return (self.path / name).is_file()

    def open(self, name: str) -> SafetensorsFile:
        """A .safetensors file. Its header is checked: every tensor lies inside the file."""
        return SafetensorsFile(LocalFile(self.path / name))

    def bytes(self, name: str) -> int:
        """Size of a file."""
        return (self.path / name).stat().st_size

    def sha256s(self, names: Sequence[str], *, memory: Path) -> list[str]:
        """Hash of each file; the file `memory` keeps them between runs."""
        return remembered_sha256s([self.path / name for name in names], memory=memory)


class BucketFiles:
    """The weight files below an `s3://` or `gs://` address; `path` holds copies of the others.

    FileNotFoundError if nothing is there; StoreError if the bucket refuses or cannot be reached.
    """

    def __init__(self, url: str):
        store = open_store(url)
        assert isinstance(store, ObjectStore), "the scheme was checked"
        self._store, self.where = store, store.url
        self._listed: Mapping[str, tuple[int, str]] = {
            key: (size, etag) for key, size, etag in store.entries()
        }
        if not self._listed:
            raise FileNotFoundError(
                f"{self.where}: nothing is there. Expected the files of a Hugging Face model "
                f"directory, with {CONFIG} and .safetensors files"
            )
        temporary = Path(tempfile.mkdtemp(prefix="decant-checkpoint-"))
        weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)
        # With the last name of the address, by which people know the model.
        self.path = temporary / self.where.rpartition("/")[2]
        self.path.mkdir()
        for name in filter(_is_small, self._listed):
            self._copy(name)

    def has(self, name: str) -> bool:
        """Whether the address has a file of this name."""
        return name in self._listed

    def open(self, name: str) -> SafetensorsFile:
        """A .safetensors file. Its header is checked: every tensor lies inside the file."""
        return SafetensorsFile(self._file(name))

    def bytes(self, name: str) -> int:
        """Size of a file."""
        return self._listed[name][0]

    def sha256s(self, names: Sequence[str], *, memory: Path) -> list[str]:
        """Hash of each file, which is read once; the file `memory` keeps them between runs."""
        return remote_sha256s([self._file(name) for name in names], memory=memory)

    def _file(self, name: str) -> RemoteFile:
        size, etag = self._listed[name]
        return RemoteFile(self._store, name, bytes=size, etag=etag)

    def _copy(self, name: str) -> None:
        size, etag = self._listed[name]
        if size > _LARGEST:
            raise ValueError(f"{self.where}/{name}: {size:,} bytes; expected at most {_LARGEST:,}")
        target = self.path / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(self._store.get(name, length=size, etag=etag))


def file_in_bucket(url: str) -> RemoteFile:
    """The file at an `s3://` or `gs://` address, of which nothing is read yet.

    FileNotFoundError if nothing is there; StoreError if the bucket refuses or cannot be reached.
    """
    folder, _, name = url.rpartition("/")
    store = open_store(folder)
    assert isinstance(store, ObjectStore), "the scheme was checked"
    head = store.head(name)
    if head is None:
        raise FileNotFoundError(f"{url}: no such file.")
    return RemoteFile(store, name, bytes=head.size, etag=head.etag)


def _is_small(name: str) -> bool:
    return name in (CONFIG, INDEX, ADAPTER_CONFIG, *FILES) or is_template_file(name)
