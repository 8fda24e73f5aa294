"""A Hugging Face directory: config.json, tokenizer.json and weights in .safetensors files."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from decant.models.checkpoints.hf_layout import CONFIG, INDEX, WEIGHTS
from decant.models.config import ModelConfig
from decant.models.families import config_from_json
from decant.models.text.tokenizer import Tokenizer


class SafetensorsFiles:
    """The tensors of a directory by their names; nothing is read before it is asked for."""

    naming: Literal["hf", "gguf"] = "hf"

    def __init__(self, path: Path):
        self.path = path
        if not (path / CONFIG).is_file():
            raise FileNotFoundError(
                f"{path}: no {CONFIG} here. Expected a Hugging Face model directory with "
                f"{CONFIG}, {WEIGHTS} and tokenizer.json."
            )

    @cached_property
    def config(self) -> ModelConfig:
        """The model's config, every field honoured or refused."""
        try:
            return config_from_json(_json(self.path / CONFIG))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    @cached_property
    def weight_files(self) -> list[Path]:
        """One file, or the shards that an index lists."""
        if self._listed is None:
            return [self.path / WEIGHTS]
        files = [self.path / name for name in sorted(set(self._listed.values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise FileNotFoundError(
                f"{self.path}: {INDEX} names {len(files)} files, of which {', '.join(absent[:5])} "
                f"{'is' if len(absent) == 1 else 'are'} not here. Download the checkpoint again."
            )
        return files

    @cached_property
    def _listed(self) -> dict[str, str] | None:
        """The index's file of every tensor; None where one file holds them all."""
        if (self.path / WEIGHTS).is_file():
            return None
        if not (self.path / INDEX).is_file():
            raise FileNotFoundError(f"{self.path}: neither {WEIGHTS} nor {INDEX} is here.")
        listed = _json(self.path / INDEX).get("weight_map")
        if not isinstance(listed, dict):
            raise ValueError(f"{self.path / INDEX}: no weight_map, which says where tensors are.")
        return listed

    @cached_property
    def _opened(self) -> dict[Path, Any]:
        files = self.weight_files
        try:
            return {file: safe_open(file, framework="numpy") for file in files}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path}: weights cannot be read: {error}") from error

    @cached_property
    def _home(self) -> dict[str, Any]:
        """The file of every tensor: the only one, and the one that the index says."""
        found: dict[str, Path] = {}
        for file, opened in self._opened.items():
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                if name in found:
                    raise ValueError(
                        f"{self.path}: tensor {name} is in both {found[name].name} and "
                        f"{file.name}; files of two checkpoints are mixed here. Download it again."
                    )
                found[name] = file
        for name, file in ({} if self._listed is None else self._listed).items():
            if found.get(name) != self.path / file:
                where = f"in {found[name].name}" if name in found else "in none of its files"
                raise ValueError(
                    f"{self.path}: {INDEX} says that tensor {name} is in {file}, but it is "
                    f"{where}. Download the checkpoint again."
                )
        return {name: self._opened[file] for name, file in found.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, as the file keeps it."""
        return {name: tuple(o.get_slice(name).get_shape()) for name, o in self._home.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """One tensor, or what lies at `index` of it, in its own dtype."""
        file = self._home[name]
        return file.get_tensor(name) if index is None else file.get_slice(name)[index]

    def tokenizer(self) -> Tokenizer:
        """The directory's tokenizer."""
        return Tokenizer.from_files(self.path)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
