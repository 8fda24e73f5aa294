"""Reading a GGUF file: config, tokenizer, and tensors dequantised to float32."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from decant.models.config import ModelConfig
from decant.models.families import config_from_gguf
from decant.models.text.gguf_tokenizer import tokenizer_files
from decant.models.text.tokenizer import Tokenizer

SUPPORTED = (
    *(Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0),
    *(Kind.Q4_K, Kind.Q6_K),
)
# Metadata under this prefix holds vocabularies. The reader unpacks arrays element by element, so
# they are unpacked only for the tokenizer.
LARGE = "tokenizer.ggml."


class GgufFile:
    """One .gguf file, with the same attributes as `SafetensorsFiles`; opened on first use."""

    naming: Literal["hf", "gguf"] = "gguf"

    def __init__(self, path: Path):
        self.path = path
        self.weight_files = [path]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file.")

    @cached_property
    def _reader(self) -> gguf.GGUFReader:
        try:
            return gguf.GGUFReader(self.path)
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{self.path}: not a readable GGUF file: {error}") from error

    @cached_property
    def _tensors(self) -> dict[str, gguf.ReaderTensor]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    @cached_property
    def config(self) -> ModelConfig:
        """The model's config. ValueError for a field of the architecture that we cannot honour."""
        fields = self._reader.fields
        small = {k: f.contents() for k, f in fields.items() if not k.startswith(LARGE)}
        if f"{LARGE}tokens" in fields:
            small["tokens"] = len(fields[f"{LARGE}tokens"].data)
        if "rope_freqs.weight" in self._tensors:
            small["rope_freqs"] = self.read("rope_freqs.weight")
        try:
            return config_from_gguf(small, self._tensors.keys())
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, axes in the order of Hugging Face files (GGUF reverses them)."""
        return {name: tuple(map(int, t.shape[::-1])) for name, t in self._tensors.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor of that name dequantised to float32, or its elements at `index`.

        ValueError for a quantisation that we cannot read.
        """
        tensor = self._tensors[name]
        if tensor.tensor_type not in SUPPORTED:
            raise ValueError(
                f"{self.path}: tensor {name} is quantised as {tensor.tensor_type.name}; only "
                f"{', '.join(kind.name for kind in SUPPORTED)} can be read. Convert the file."
            )
        # asarray, because the dequantiser slices often, which is slow on a memmap.
        array = gguf.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        array = array.astype(np.float32, copy=False).reshape(self.shapes[name])
        return array if index is None else array[index]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the metadata describes. ValueError for a kind we cannot rebuild."""
        fields = self._reader.fields
        metadata = {k: f.contents() for k, f in fields.items() if k.startswith("tokenizer.")}
        return Tokenizer(tokenizer_files(metadata, where=str(self.path)), where=str(self.path))
