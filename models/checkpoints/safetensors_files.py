"""Reading a Hugging Face directory: config.json, tokenizer, weights in .safetensors files."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from decant.models.checkpoints.hf_layout import CONFIG, INDEX, WEIGHTS
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

    def __init__(self, path: Path):
        self.path = path
        if not (path / CONFIG).is_file():
            raise FileNotFoundError(
                f"{path}: no {CONFIG} here. Expected a Hugging Face model directory with "
                f"{CONFIG}, {WEIGHTS} and tokenizer.json."
            )

    @cached_property
    def config(self) -> ModelConfig:
        """The model's config. ValueError for a field that we cannot honour."""
        return config_from_file(self.path / CONFIG)

    @cached_property
    def weight_files(self) -> list[Path]:
        """The one weights file, or the files that the index lists. All must exist."""
        if self._index is None:
            return [self.path / WEIGHTS]
        files = [self.path / name for name in sorted(set(self._index.values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise FileNotFoundError(
                f"{self.path}: {INDEX} names {len(files)} files, of which {', '.join(absent[:5])} "
                f"{'is' if len(absent) == 1 else 'are'} not here. Download the checkpoint again."
            )
        return files

    @cached_property
    def _index(self) -> dict[str, str] | None:
        """Tensor → name of its file, as the index says; None if one file holds all tensors."""
        if (self.path / WEIGHTS).is_file():
            return None
        if not (self.path / INDEX).is_file():
            raise FileNotFoundError(f"{self.path}: neither {WEIGHTS} nor {INDEX} is here.")
        return read_index(self.path)

    @cached_property
    def _opened(self) -> dict[Path, Any]:
        return {file: _opened(file) for file in self.weight_files}

    @cached_property
    def _file_of(self) -> dict[str, Any]:
        """Tensor → its opened file. ValueError if two files hold it or the index disagrees."""
        files: dict[str, Path] = {}
        for file, opened in self._opened.items():
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                if name in files:
                    raise ValueError(
                        f"{self.path}: tensor {name} is in both {files[name].name} and "
                        f"{file.name}; files of two checkpoints are mixed here. Download it again."
                    )
                files[name] = file
        for name, file in ({} if self._index is None else self._index).items():
            if files.get(name) != self.path / file:
                where = f"in {files[name].name}" if name in files else "in none of its files"
                raise ValueError(
                    f"{self.path}: {INDEX} says that tensor {name} is in {file}, but it is "
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
                f"{self.path}: tensor {name} is stored as {self.kinds[name]}; weights can be read "
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
        return Tokenizer(files, where=str(self.path))


def _opened(file: Path) -> Any:
    """A .safetensors file. Its header is checked: every tensor lies inside the file."""
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: weights cannot be read: {error}. Download the file again if it was cut short."
        ) from error
