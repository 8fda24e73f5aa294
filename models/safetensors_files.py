"""A Hugging Face directory: config.json, tokenizer.json and weights in .safetensors files."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from models.config import ModelConfig
from models.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


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
            return ModelConfig.from_hf(_json(self.path / CONFIG))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    @cached_property
    def weight_files(self) -> list[Path]:
        """One file, or the shards that an index lists."""
        index = self.path / f"{WEIGHTS}.index.json"
        if (self.path / WEIGHTS).is_file():
            return [self.path / WEIGHTS]
        if index.is_file():
            return [self.path / name for name in sorted(set(_json(index)["weight_map"].values()))]
        raise FileNotFoundError(f"{self.path}: neither {WEIGHTS} nor {index.name} is here.")

    @cached_property
    def _opened(self) -> dict[Path, Any]:
        try:
            return {file: safe_open(file, framework="numpy") for file in self.weight_files}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path}: weights cannot be read: {error}") from error

    @cached_property
    def _home(self) -> dict[str, Any]:
        return {name: opened for opened in self._opened.values() for name in opened.keys()}  # noqa: SIM118

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, as the file keeps it."""
        return {name: tuple(o.get_slice(name).get_shape()) for name, o in self._home.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor in its own dtype."""
        return self._home[name].get_tensor(name)

    def tokenizer(self) -> Tokenizer:
        """The directory's tokenizer."""
        return Tokenizer.from_files(self.path)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
