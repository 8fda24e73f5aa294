"""Reading a Hugging Face directory: config.json, tokenizer, weights in .safetensors files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from decant.models.checkpoints.hf_layout import CONFIG, INDEX, WEIGHTS
from decant.models.checkpoints.weight_files import BucketFiles, LocalFiles
from decant.models.checkpoints.weight_index import read_index
from decant.models.config import ModelConfig
from decant.models.families import config_from_file
from decant.models.families.towers import is_tower, text_fields, text_name, text_tensors
from decant.models.json_file import read_object
from decant.models.prequantised.scheme import FIELDS, Scheme, Stored, read_scheme
from decant.models.prequantised.stored import KINDS, Header, InFile, full_index
from decant.models.text.tokenizer import GENERATION, Tokenizer, read_files


class SafetensorsFiles:
    """One directory; every file is opened on first use."""

    naming: Literal["hf", "gguf"] = "hf"
    readable = ("F64", "F32", "F16", "BF16", *KINDS)
    """The kinds of numbers that are weights."""

    def __init__(self, place: Path | LocalFiles | BucketFiles):
        self._files = files = LocalFiles(place) if isinstance(place, Path) else place
        self.path = path = files.path
        """The directory of config and tokenizer."""
        self.where = files.where
        """The directory or address as the user knows it."""
        if not (path / CONFIG).is_file():
            raise FileNotFoundError(
                f"{self.where}: no {CONFIG} here. Expected a Hugging Face model directory with "
                f"{CONFIG}, {WEIGHTS} and tokenizer.json."
            )

    @cached_property
    def config(self) -> ModelConfig:
        """The model's config. ValueError for a field that we cannot honour."""
        try:
            config = config_from_file(self.path / CONFIG)
            _ = self._scheme
            return config
        except ValueError as error:
            raise ValueError(str(error).replace(str(self.path), self.where)) from error

    @cached_property
    def _scheme(self) -> Scheme | None:
        """How the weights are quantised; None if they are plain numbers."""
        try:
            return read_scheme(read_object(self.path / CONFIG))
        except ValueError as error:
            message = str(error).removeprefix(f"{CONFIG}: ")
            raise ValueError(f"{self.where}/{CONFIG}: {message}") from error

    @cached_property
    def weight_files(self) -> list[str]:
        """Name of the one weights file, or of the files that the index lists. All must exist."""
        if self._index is None:
            return [WEIGHTS]
        files = sorted(set(self._index.values()))
        absent = [name for name in files if not self._files.has(name)]
        if absent:
            raise FileNotFoundError(
                f"{self.where}: {INDEX} names {len(files)} files, of which {', '.join(absent[:5])} "
                f"{'is' if len(absent) == 1 else 'are'} not here. Download the checkpoint again."
            )
        return files

    @property
    def weight_bytes(self) -> int:
        """Size of all weight files."""
        return sum(map(self._files.bytes, self.weight_files))

    def weight_sha256s(self, *, memory: Path) -> dict[str, str]:
        """Hash of each weight file by its name; the file `memory` keeps them between runs.

        Of quantised files there is one more: of what config.json says on how to read them.
        """
        digests = self._files.sha256s(self.weight_files, memory=memory)
        hashes = dict(zip(self.weight_files, digests, strict=True))
        if self._scheme:
            # The same bytes are other weights if config.json reads them otherwise.
            spelled = json.dumps(self._scheme.identity, sort_keys=True)
            hashes[f"{CONFIG}: {FIELDS[0]}"] = hashlib.sha256(spelled.encode()).hexdigest()
        return hashes

    @cached_property
    def _index(self) -> dict[str, str] | None:
        """Tensor → name of its file, as the index says; None if one file holds all tensors."""
        if self._files.has(WEIGHTS):
            return None
        if not self._files.has(INDEX):
            raise FileNotFoundError(f"{self.where}: neither {WEIGHTS} nor {INDEX} is here.")
        return read_index(self.path)

    @cached_property
    def _opened(self) -> dict[str, Any]:
        return {name: self._files.open(name) for name in self.weight_files}

    @cached_property
    def _file_of(self) -> dict[str, Any]:
        """Tensor → its opened file. ValueError if two files hold it or the index disagrees."""
        files: dict[str, str] = {}
        for file, opened in self._opened.items():
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                if name in files:
                    raise ValueError(
                        f"{self.where}: tensor {name} is in both {files[name]} and "
                        f"{file}; files of two checkpoints are mixed here. Download it again."
                    )
                files[name] = file
        for name, file in ({} if self._index is None else self._index).items():
            if files.get(name) != file:
                where = f"in {files[name]}" if name in files else "in none of its files"
                raise ValueError(
                    f"{self.where}: {INDEX} says that tensor {name} is in {file}, but it is "
                    f"{where}. Download the checkpoint again."
                )
        return {name: self._opened[file] for name, file in files.items()}

    @cached_property
    def _in_files(self) -> Header:
        """Every tensor of the files as it is stored."""
        slices = {name: file.get_slice(name) for name, file in self._file_of.items()}
        return {n: InFile(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}

    @cached_property
    def _tensors(self) -> Mapping[str, InFile | Stored]:
        """Every tensor of the plain model. ValueError if config.json contradicts the files."""
        if self._scheme is None:
            return self._in_files
        try:
            stored, others = self._scheme.plain(self._in_files)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error
        return {**{name: self._in_files[name] for name in others}, **stored}

    @cached_property
    def _stored_name(self) -> dict[str, str]:
        """Name of every tensor of the model → its name in the files.

        They differ in models of images and text, whose other tensors are left out.
        """
        if not is_tower(read_object(self.path / CONFIG)):
            return {name: name for name in self._tensors}
        try:
            return text_tensors(self._tensors)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error

    def own_name(self, name: str) -> str:
        """The model's name of a tensor that other files, such as an adapter's, call `name`."""
        return text_name(name) if is_tower(read_object(self.path / CONFIG)) else name

    @property
    def unread(self) -> list[str]:
        """Names in the files of the tensors that belong to other parts than the text model."""
        return sorted(self._tensors.keys() - self._stored_name.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor; quantised ones have that of their plain weight."""
        return {name: self._tensors[stored].shape for name, stored in self._stored_name.items()}

    @cached_property
    def kinds(self) -> dict[str, str]:
        """How every tensor's numbers are stored, such as "BF16" or "INT4"."""
        tensors = {name: self._tensors[stored] for name, stored in self._stored_name.items()}
        return {n: t.dtype if isinstance(t, InFile) else t.kind for n, t in tensors.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor of that name, or its elements at `index`, in the dtype of the file.

        Quantised tensors are dequantised, of an index only its elements. ValueError if its numbers
        are not in `readable`, such as integers of which config.json says nothing.
        """
        stored = self._stored_name[name]
        tensor = self._tensors[stored]
        if not isinstance(tensor, InFile):
            return tensor.read(self._stored, full_index(tensor.shape) if index is None else index)
        if tensor.dtype not in self.readable:
            raise ValueError(
                f"{self.where}: tensor {name} is stored as {tensor.dtype}; weights can be read "
                f"as {', '.join(self.readable)}. Use the unquantised checkpoint."
            )
        return self._stored(stored, index)

    def _stored(self, name: str, index: tuple[slice, ...] | None) -> np.ndarray:
        """A tensor of the files, or its elements at `index`, as it is stored."""
        file = self._file_of[name]
        return file.get_tensor(name) if index is None else file.get_slice(name)[index]

    def tokenizer(self) -> Tokenizer:
        """The directory's tokenizer."""
        files = read_files(self.path)
        fields = read_object(self.path / CONFIG)
        ends = fields.get("eos_token_id") or text_fields(fields).get("eos_token_id")
        if GENERATION not in files and ends is not None:
            # Without generation_config.json transformers, too, takes the end tokens from here.
            files[GENERATION] = json.dumps({"eos_token_id": ends}).encode()
        return Tokenizer(files, where=self.where)
