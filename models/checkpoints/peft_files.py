"""Reading a PEFT directory: a base checkpoint with the changes of a LoRA adapter merged into it.

The merge is made where tensors are read, in the names and shapes of the base's files. So whatever
reads a checkpoint reads a base with an adapter: share by share, for any family.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from decant.models.checkpoints.hf_layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    WEIGHTS,
)
from decant.models.checkpoints.peft_config import PeftConfig, read_peft_config
from decant.models.checkpoints.safetensors_files import SafetensorsFiles
from decant.models.checkpoints.weight_files import BucketFiles, LocalFiles
from decant.models.config import ModelConfig
from decant.models.families.field_reader import shown
from decant.models.prequantised.stored import full_index
from decant.models.text.tokenizer import Tokenizer, read_files
from decant.schemas.disk.identity import digest
from decant.store import is_url

_PREFIX = "base_model.model."
_A, _B, _WEIGHT = ".lora_A.weight", ".lora_B.weight", ".weight"
_HEADS = ("lm_head", "embed_tokens", "embed_out", "embed_in", "wte")
_ROWS = 1024
_PLAIN = ("F64", "F32", "F16", "BF16")


class PeftFiles:
    """An adapter's directory and its base, with the same attributes as `SafetensorsFiles`."""

    naming: Literal["hf", "gguf"] = "hf"

    def __init__(self, place: LocalFiles | BucketFiles, base: SafetensorsFiles):
        self._files, self._base = place, base
        self.path, self.where = place.path, place.where
        self.readable = base.readable
        if not place.has(ADAPTER_WEIGHTS):
            raise FileNotFoundError(
                f"{self.where}: has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; other formats of "
                "adapters cannot be read. Save it as safetensors"
            )

    @cached_property
    def adapter(self) -> PeftConfig:
        """The adapter's settings."""
        return read_peft_config(self.path / ADAPTER_CONFIG)

    @property
    def config(self) -> ModelConfig:
        """The base's config."""
        return self._base.config

    @property
    def weight_files(self) -> list[str]:
        """The base's files and the adapter's."""
        return [*self._base.weight_files, ADAPTER_WEIGHTS]

    @property
    def unread(self) -> list[str]:
        """Names of the base's tensors that belong to other parts than the text model."""
        return self._base.unread

    @property
    def weight_bytes(self) -> int:
        """Size of all of them."""
        return self._base.weight_bytes + self._files.bytes(ADAPTER_WEIGHTS)

    def weight_sha256s(self, *, memory: Any) -> dict[str, str]:
        """Hashes of the base's files, of the adapter's matrices and of its scaling."""
        (weights,) = self._files.sha256s([ADAPTER_WEIGHTS], memory=memory)
        adapter = {ADAPTER_WEIGHTS: weights, ADAPTER_CONFIG: digest(self.adapter.identity())}
        return self._base.weight_sha256s(memory=memory) | adapter

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the base. ValueError if the adapter does not fit them."""
        _ = self._changes
        return self._base.shapes

    @property
    def kinds(self) -> dict[str, str]:
        """How the base stores every tensor's numbers."""
        return self._base.kinds

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor of the base, or its elements at `index`; float32 if the adapter changes it."""
        changes, replaced = self._changes
        if name in replaced:
            return self._matrix(replaced[name], index)
        array = self._base.read(name, index)
        if name not in changes:
            return array
        rows, columns = index or full_index(array.shape)
        merged = array.astype(np.float32)  # a copy: the base may be read from a mapped file
        self._add(changes[name], merged, rows, columns)
        return merged

    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the adapter, if there is one; else the base's."""
        if (self.path / "tokenizer.json").is_file():
            return Tokenizer(read_files(self.path), where=self.where)
        return self._base.tokenizer()

    @cached_property
    def _opened(self) -> Any:
        return self._files.open(ADAPTER_WEIGHTS)

    def _matrix(self, key: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self._opened.get_tensor(key) if index is None else self._opened.get_slice(key)[index]

    @cached_property
    def _changes(self) -> tuple[dict[str, _Change], dict[str, str]]:
        """The changed tensors of the base, and those that the adapter's own tensors replace.

        ValueError, naming the tensor, if one is not of this base or of a kind that we cannot merge.
        """
        keys, shapes = set(self._opened.keys()), self._base.shapes
        changes, replaced = {}, {}
        for key in sorted(keys):
            name = self._base.own_name(key.removeprefix(_PREFIX))
            if key.endswith(_B) and key.removesuffix(_B) + _A in keys:
                continue
            if key.endswith(_A):
                module = name.removesuffix(_A)
                shape = shapes.get(module + _WEIGHT)
                has_b = key.removesuffix(_A) + _B in keys
                changes[module + _WEIGHT] = self._change(key.removesuffix(_A), module, shape, has_b)
            elif name in shapes:
                self._require_untied(name)
                self._require_shape(key, shapes[name], base=name)
                replaced[name] = key
            else:
                raise ValueError(
                    f"{self.where}: tensor {shown(key)} is neither a LoRA matrix of a linear map "
                    f"nor a tensor of the base {self._base.where}. {_REMEDY}"
                )
        if not changes and not replaced:
            raise ValueError(f"{self.where}: {ADAPTER_WEIGHTS} holds no matrices.")
        return changes, replaced

    def _change(self, key: str, module: str, shape: tuple[int, ...] | None, has_b: bool) -> _Change:
        name = module + _WEIGHT
        if shape is None or len(shape) != 2 or not has_b:
            why = f"has {_B[1:]} missing" if shape else "is not in the base"
            raise ValueError(f"{self.where}: {shown(module)} {why}, {self._base.where}. {_REMEDY}")
        outputs, inputs = shape[::-1] if self.adapter.transposed else shape
        rank = self.adapter.rank_of(module)
        self._require_shape(key + _A, (rank, inputs), base=name)
        self._require_shape(key + _B, (outputs, rank), base=name)
        if module.rpartition(".")[2] in _HEADS:
            self._require_untied(name)
        return _Change(key, self.adapter.scaling(module))

    def _add(self, change: _Change, matrix: np.ndarray, rows: slice, columns: slice) -> None:
        """Add the change's elements at `rows` and `columns` to `matrix`, which holds these alone.

        In float64, so that every way to split the matrix gives the same float32 numbers.
        """
        a, b = (self._matrix(change.key + part).astype(np.float64) for part in (_A, _B))
        left, right = (a.T, b.T) if self.adapter.transposed else (b, a)
        left, right = left[rows], change.scaling * right[:, columns]
        for start in range(0, len(left), _ROWS):
            at = slice(start, start + _ROWS)
            matrix[at] = (matrix[at].astype(np.float64) + left[at] @ right).astype(np.float32)

    def _require_shape(self, key: str, expected: tuple[int, ...], *, base: str) -> None:
        stored = self._opened.get_slice(key)
        shape, kind = tuple(stored.get_shape()), stored.get_dtype()
        if shape != expected or kind not in _PLAIN:
            raise ValueError(
                f"{self.where}: {key} is {kind} {list(shape)}, expected {list(expected)} for "
                f"{base} of {self._base.where}, as one of {' '.join(_PLAIN)}. {_REMEDY}"
            )

    def _require_untied(self, name: str) -> None:
        """ValueError for a changed embedding that is also the head: PEFT changes one of the two."""
        if self.config.tie_embeddings and name.split(".")[-2] in _HEADS:
            raise ValueError(
                f"{self.where}: changes {name}, but the base's head is its embedding. Merge the "
                "adapter with PEFT (`merge_and_unload`) and name the directory that it saves"
            )


_REMEDY = (
    f"Is it an adapter of another model? Its {ADAPTER_CONFIG} names the base "
    "(base_model_name_or_path). Other kinds can be merged with PEFT (`merge_and_unload`)"
)


@dataclass(frozen=True)
class _Change:
    """What an adapter adds to one matrix: `scaling` · B·A, or its transpose."""

    key: str
    """Of the matrices in the adapter's file, without their endings."""
    scaling: float


def is_adapter(place: LocalFiles | BucketFiles) -> bool:
    """Whether a directory holds an adapter and no weights of a whole model."""
    return place.has(ADAPTER_CONFIG) and not place.has(WEIGHTS) and not place.has(INDEX)


def place_of_base(place: LocalFiles | BucketFiles) -> str:
    """The directory or hub id that the adapter's config names, a path as seen from its directory.

    ValueError for an address: a stranger's adapter must not choose whom this machine asks.
    """
    base = read_peft_config(place.path / ADAPTER_CONFIG).base
    if is_url(base):
        raise ValueError(
            f"{place.where}: the base {shown(base)} is an address; copy it to this machine and "
            f"name its directory in {ADAPTER_CONFIG} (base_model_name_or_path)"
        )
    beside = place.path / base
    return str(beside) if beside.is_dir() else base
