"""Reading a GGUF file: config, tokenizer, and tensors dequantised to float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import gguf
import numpy as np

from decant.models.checkpoints.file_bytes import LocalFile, RemoteFile, remote_sha256s
from decant.models.checkpoints.gguf_header import GgufHeader, GgufTensor, read_header
from decant.models.config import ModelConfig
from decant.models.families import config_from_gguf
from decant.models.families.family import ROPE_TENSORS
from decant.models.text.gguf_tokenizer import tokenizer_files
from decant.models.text.tokenizer import Tokenizer
from decant.schemas.disk.identity import remembered_sha256s


class GgufFile:
    """One .gguf file, with the same attributes as `SafetensorsFiles`; opened on first use."""

    naming: Literal["hf", "gguf"] = "gguf"
    readable = (
        *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K"),
        *("Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"),
    )
    """Quantisations that we can read."""
    unread: Sequence[str] = ()
    """Files of images lie apart from the text model's."""

    def __init__(self, file: Path | RemoteFile):
        if isinstance(file, Path) and not file.is_file():
            raise FileNotFoundError(f"{file}: no such file.")
        self._file = LocalFile(file) if isinstance(file, Path) else file
        self.where = self._file.where
        """The path or address."""
        self.path = Path(self.where)
        self.weight_files = [self.path.name]

    @property
    def weight_bytes(self) -> int:
        """Size of the file."""
        return self._file.size

    def weight_sha256s(self, *, memory: Path) -> dict[str, str]:
        """Hash of the file by its name; the file `memory` keeps it between runs."""
        if isinstance(self._file, RemoteFile):
            (digest,) = remote_sha256s([self._file], memory=memory)
        else:
            (digest,) = remembered_sha256s([self.path], memory=memory)
        return {self.path.name: digest}

    @cached_property
    def _header(self) -> GgufHeader:
        try:
            return read_header(self._file)
        except ValueError as error:
            raise ValueError(f"{self.where}: not a readable GGUF file: {error}.") from error

    @cached_property
    def config(self) -> ModelConfig:
        """The model's config. ValueError for a field of the architecture that we cannot honour."""
        metadata = dict(self._header.metadata)
        if isinstance(tokens := metadata.get("tokenizer.ggml.tokens"), list):
            metadata["tokens"] = len(tokens)
        for name in ROPE_TENSORS:
            if f"{name}.weight" in self.shapes:
                metadata[name] = self.read(f"{name}.weight")
        try:
            return config_from_gguf(metadata, self.shapes.keys())
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, axes in the order of Hugging Face files (GGUF reverses them)."""
        return {name: tensor.shape for name, tensor in self._header.tensors.items()}

    @cached_property
    def kinds(self) -> dict[str, str]:
        """How every tensor's numbers are stored, such as "Q4_K"."""
        return {name: tensor.kind.name for name, tensor in self._header.tensors.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor of that name dequantised to float32, or its elements at `index`.

        Of the first axis only what lies in `index` is read. ValueError for a quantisation that we
        cannot read.
        """
        tensor = self._header.tensors[name]
        if tensor.kind.name not in self.readable:
            raise ValueError(
                f"{self.where}: tensor {name} is quantised as {tensor.kind.name}; only "
                f"{', '.join(self.readable)} can be read. Convert the file."
            )
        rows = range(tensor.shape[0])
        if index and len(tensor.shape) > 1:  # else blocks of numbers lie along the only axis
            rows, index = rows[index[0]], (slice(None), *index[1:])
        array = self._rows(tensor, rows)
        return array if index is None else array[index]

    def _rows(self, tensor: GgufTensor, rows: range) -> np.ndarray:
        shape = (len(rows), *tensor.shape[1:])
        if 0 in shape:
            return np.zeros(shape, np.float32)
        size = tensor.size // tensor.shape[0]
        start = tensor.start + rows.start * size
        data = self._file.read(start, start + len(rows) * size).reshape(math.prod(shape[:-1]), -1)
        return gguf.dequantize(data, tensor.kind).astype(np.float32, copy=False).reshape(shape)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the metadata describes. ValueError for a kind we cannot rebuild."""
        files = tokenizer_files(self._header.metadata, where=self.where)
        return Tokenizer(files, where=self.where)
