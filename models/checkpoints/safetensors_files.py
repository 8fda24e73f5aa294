"""Reading a Hugging Face directory: config.json, tokenizer, weights in .safetensors files."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from decant.models.checkpoints.hf_layout import CONFIG, INDEX, WEIGHTS
from decant.models.checkpoints.weight_files import BucketFiles, LocalFiles
from decant.models.checkpoints.weight_index import read_index
from decant.models.config import ModelConfig
from decant.models.families import config_from_file
from decant.models.json_file import read_object
from decant.models.text.tokenizer import GENERATION, Tokenizer, read_files


class SafetensorsFiles:
    """One directory; every file is opened on first use."""

    naming: Literal["hf", "gguf"] = "hf"
    readable = ("F64", "F32", "F16", "BF16")
    """The kinds of numbers that are weights."""

    def __init__(self, place: Path | BucketFiles):
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
            return config_from_file(self.path / CONFIG)
        except ValueError as error:
            raise ValueError(str(error).replace(str(self.path), self.where)) from error

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
        """Hash of each weight file by its name; the file `memory` keeps them between runs."""
        digests = self._files.sha256s(self.weight_files, memory=memory)
        return dict(zip(self.weight_files, digests, strict=True))

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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in the files."""
        return {
            name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()
        }

    @cached_property
    def kinds(self) -> dict[str, str]:
        """How every tensor's numbers are stored, such as "BF16"."""
        return {name: file.get_slice(name).get_dtype() for name, file in self._file_of.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor of that name, or its elements at `index`, in the dtype of the file.

        ValueError if its numbers are not in `readable`, such as integers of a quantised matrix.
        """
        if self.kinds[name] not in self.readable:
            raise ValueError(
                f"{self.where}: tensor {name} is stored as {self.kinds[name]}; weights can be read "
                f"as {', '.join(self.readable)}. Use the unquantised checkpoint."
            )
        file = self._file_of[name]
        return file.get_tensor(name) if index is None else file.get_slice(name)[index]

    def tokenizer(self) -> Tokenizer:
        """The directory's tokenizer."""
        files = read_files(self.path)
        ends = read_object(self.path / CONFIG).get("eos_token_id")
        if GENERATION not in files and ends is not None:
            # Without generation_config.json transformers, too, takes the end tokens from here.
            files[GENERATION] = json.dumps({"eos_token_id": ends}).encode()
        return Tokenizer(files, where=self.where)
