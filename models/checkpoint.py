"""Checkpoints in and out: a Hugging Face directory or id, a GGUF file, or the embedded teacher."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save_file

from models import embedded, families, hub, sharding
from models.config import ModelConfig
from models.decoder import Decoder, parameters
from models.families import TensorName
from models.gguf_file import GgufFile, undo_interleaving
from models.numerics import dtype_named
from models.safetensors_files import CONFIG, WEIGHTS, SafetensorsFiles
from models.tokenizer import Tokenizer

# What a file format offers: naming, weight_files, config, shapes, read(name), tokenizer().
TensorFiles = SafetensorsFiles | GgufFile


def open_checkpoint(name: str | Path) -> Checkpoint:
    """Open "embedded", a Hugging Face directory, a .gguf file, or a hub id; weights are not read
    yet. What is here has precedence over what is on the hub."""
    path = embedded.locate() if str(name) == embedded.NAME else Path(name)
    hub_id = None if path.exists() else hub.HubId.parse(str(name))
    if hub_id:
        located = hub.locate(hub_id)
        return dataclasses.replace(open_checkpoint(located.path), name=located.pinned)
    if path.is_dir():
        return Checkpoint(str(name), path, SafetensorsFiles(path))
    if path.suffix == ".gguf":
        return Checkpoint(str(name), path, GgufFile(path))
    raise FileNotFoundError(
        f"checkpoint {str(name)!r}: expected 'embedded', a Hugging Face directory, a .gguf file or "
        f"a hub id; {path} is {'a file of another kind' if path.exists() else 'not there'}."
    )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its config, tokenizer and weights, each read when asked for."""

    name: str
    """What opens it again, and nothing else: one from the hub has its commit here."""
    path: Path
    files: TensorFiles

    @property
    def title(self) -> str:
        """What people call it, wherever it lies."""
        return hub.unpinned(self.name) or self.path.name

    @property
    def config(self) -> ModelConfig:
        """Shape of the model; a field that we cannot honour raises."""
        return self.files.config

    @property
    def weight_files(self) -> list[Path]:
        """Files whose bytes decide the weights."""
        return self.files.weight_files

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, which must fit the embedding."""
        tokenizer = self.files.tokenizer()
        if tokenizer.size > self.config.vocab_size:
            raise ValueError(
                f"{self.path}: the tokenizer has {tokenizer.size} ids but the embedding only "
                f"{self.config.vocab_size} rows; these files do not belong together."
            )
        return tokenizer

    def load(
        self, *, dtype: str = "float32", param_dtype: str | None = None, mesh: Mesh | None = None
    ) -> Decoder:
        """Read the weights into a decoder that computes in `dtype`.

        Weights are kept in `param_dtype` (default: `dtype`) and, with a mesh, placed by
        the rules of `models.sharding`.
        """
        compute, kept = dtype_named(dtype), dtype_named(param_dtype or dtype)
        names = families.named(self.config.family).tensors(self.config)
        model = nnx.eval_shape(
            lambda: Decoder(self.config, rngs=nnx.Rngs(0), dtype=compute, param_dtype=kept)
        )
        ours = parameters(model)
        self._check(names, {path: p.get_value().shape for path, p in ours.items()})
        places = None if mesh is None else sharding.parameter_shardings(model, mesh)
        for path, parameter in ours.items():
            array = self._read(names[path], parameter.get_value())
            placed = jnp.asarray(array) if places is None else jax.device_put(array, places[path])
            parameter.set_value(placed)
        return model

    def _read(self, name: TensorName, like: jax.ShapeDtypeStruct) -> np.ndarray:
        """One parameter, its layers stacked."""
        pattern = getattr(name, self.files.naming)
        if "{layer}" not in pattern:
            return self._read_layer(pattern, name, like.shape).astype(like.dtype)
        stacked = np.empty(like.shape, like.dtype)
        for layer in range(like.shape[0]):
            stacked[layer] = self._read_layer(pattern.format(layer=layer), name, like.shape[1:])
        return stacked

    def _read_layer(self, stored: str, name: TensorName, shape: tuple[int, ...]) -> np.ndarray:
        array = self.files.read(stored)
        family = families.named(self.config.family)
        if name.rotary and self.files.naming == "gguf" and family.gguf_interleaves_rotary:
            array = undo_interleaving(array, heads=shape[1])
        return name.from_file(array, shape)

    def _check(
        self, names: Mapping[str, TensorName], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """The file must hold exactly the tensors that the config calls for."""
        expected: dict[str, tuple[int, ...]] = {}
        for path, name in names.items():
            pattern, shape = getattr(name, self.files.naming), shapes[path]
            if "{layer}" in pattern:
                for layer in range(shape[0]):
                    expected[pattern.format(layer=layer)] = name.file_shape(shape[1:])
            else:
                expected[pattern] = name.file_shape(shape)
        redundant = families.named(self.config.family).redundant
        found = {
            name: shape
            for name, shape in self.files.shapes.items()
            if not any(re.fullmatch(pattern, name) for pattern in redundant)
        }
        problems = [f"missing: {n} {expected[n]}" for n in expected if n not in found]
        problems += [f"not expected: {n} {found[n]}" for n in found if n not in expected]
        problems += [
            f"misshapen: {n} is {found[n]}, expected {expected[n]}"
            for n in expected
            if n in found and found[n] != expected[n]
        ]
        if problems:
            more = [f"… and {len(problems) - 10} more"] if len(problems) > 10 else []
            raise ValueError(
                f"{self.path}: tensors do not fit the config (a family "
                f"'{self.config.family}' model of {self.config.num_layers} layers):\n  "
                + "\n  ".join(problems[:10] + more)
            )


def save_directory(model: Decoder, path: Path | str, tokenizer_files: Mapping[str, bytes]) -> None:
    """Write a Hugging Face directory that `open_checkpoint` and transformers read.

    Weights keep the dtype they have. The weights file appears last and whole.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    values = parameters(model)
    for path_in_model, name in families.named(model.config.family).tensors(model.config).items():
        array = np.asarray(values[path_in_model].get_value())
        if "{layer}" in name.hf:
            layers = {name.hf.format(layer=i): name.to_file(a) for i, a in enumerate(array)}
            tensors |= layers
        else:
            tensors[name.hf] = name.to_file(array)
    config = model.config.to_hf() | {"torch_dtype": str(model.param_dtype)}
    for file, content in tokenizer_files.items():
        (path / file).write_bytes(content)
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    partial = path / f"{WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.rename(path / WEIGHTS)
