"""Checkpoints in and out: a Hugging Face directory or id, a GGUF file, or the embedded teacher."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save_file

from decant.models import families
from decant.models.checkpoints import embedded, hub
from decant.models.checkpoints.gguf_file import GgufFile
from decant.models.checkpoints.loading import Index, TensorFiles, placed, read_share, whole
from decant.models.checkpoints.quantization import (
    MATRICES,
    SCALE,
    codes_of,
    inputs_of,
    quantize_abstractly,
    scales_of,
)
from decant.models.checkpoints.safetensors_files import CONFIG, WEIGHTS, SafetensorsFiles
from decant.models.config import ModelConfig
from decant.models.decoder.decoder import Decoder
from decant.models.families import TensorName
from decant.models.mesh import sharding
from decant.models.mesh.parameters import parameters
from decant.models.numerics import dtype_named
from decant.models.text.tokenizer import Tokenizer

Quantize = Literal["none", "int8"]


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

    def abstract(
        self,
        *,
        dtype: str = "float32",
        param_dtype: str | None = None,
        quantize: Quantize = "none",
    ) -> Decoder:
        """The decoder that `load` gives, with shapes and dtypes where its weights would be."""
        compute, kept = dtype_named(dtype), dtype_named(param_dtype or dtype)
        model = nnx.eval_shape(
            lambda: Decoder(self.config, rngs=nnx.Rngs(0), dtype=compute, param_dtype=kept)
        )
        if quantize == "int8":
            quantize_abstractly(model.blocks, self._inputs)
        return model

    def load(
        self,
        *,
        dtype: str = "float32",
        param_dtype: str | None = None,
        quantize: Quantize = "none",
        mesh: Mesh | None = None,
    ) -> Decoder:
        """Read the weights into a decoder that computes in `dtype`.

        Weights are kept in `param_dtype` (default: `dtype`), or the blocks' matrices in int8. With
        a mesh they are placed by the rules of `models.mesh.sharding`, each device's share straight
        from the files.
        """
        model = self.abstract(dtype=dtype, param_dtype=param_dtype, quantize=quantize)
        ours = parameters(model)
        shapes = {path: p.get_value().shape for path, p in ours.items()}
        self._check(self._names, {path: shapes[path] for path in self._names if path in shapes})
        places = {} if mesh is None else sharding.parameter_shardings(model, mesh)

        def put(path: str, read: Callable[[Index], np.ndarray]) -> None:
            shape = shapes[path]
            array = placed(read, shape, places[path]) if places else jnp.asarray(read(whole(shape)))
            ours[path].set_value(array)

        for path in self._names:
            dtype_kept = ours[path].get_value().dtype
            if dtype_kept != np.int8:
                put(path, partial(self._share, path, shapes[path], dtype=dtype_kept))
                continue
            scales = self._scales(path, shapes[path], ours[path].get_metadata()["axes"])
            put(path + SCALE, scales.__getitem__)
            put(path, partial(self._codes, path, shapes[path], ours[path], scales))
        return model

    @cached_property
    def _names(self) -> dict[str, TensorName]:
        return families.named(self.config.family).tensors(self.config)

    @cached_property
    def _inputs(self) -> dict[str, int]:
        """How many input axes each matrix of the blocks has, by name."""
        return {name: self._names[f"blocks.{name}"].in_axes or 0 for name in MATRICES}

    def _share(
        self, path: str, shape: tuple[int, ...], index: Index, *, dtype: Any = np.float32
    ) -> np.ndarray:
        family = families.named(self.config.family)
        interleaved = self.files.naming == "gguf" and family.gguf_interleaves_rotary
        name = self._names[path]
        return read_share(self.files, name, shape, index, dtype=dtype, interleaved=interleaved)

    def _scales(self, path: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> np.ndarray:
        """Of the whole matrix, so that they are the same on every mesh; a layer at a time."""
        over = inputs_of(axes, inputs=self._inputs[path.removeprefix("blocks.")])
        layers = [
            scales_of(self._share(path, shape, (slice(i, i + 1), *whole(shape[1:]))), over=over)
            for i in range(shape[0])
        ]
        return np.concatenate(layers)

    def _codes(
        self,
        path: str,
        shape: tuple[int, ...],
        parameter: nnx.Variable,
        scales: np.ndarray,
        index: Index,
    ) -> np.ndarray:
        axes = parameter.get_metadata()["axes"]
        over = inputs_of(axes, inputs=self._inputs[path.removeprefix("blocks.")])
        of_share = scales[tuple(at for i, at in enumerate(index) if i not in over)]
        codes = np.empty([at.stop - at.start for at in index], np.int8)
        for i, layer in enumerate(range(index[0].start, index[0].stop)):
            matrix = self._share(path, shape, (slice(layer, layer + 1), *index[1:]))
            codes[i : i + 1] = codes_of(matrix, of_share[i : i + 1], over=over)
        return codes

    def _tied_head(self) -> list[str]:
        """The head that some tied checkpoints carry all the same, which must be the embedding."""
        config = self.config
        apart = dataclasses.replace(config, tie_embeddings=False)
        names = families.named(config.family).tensors(apart)
        head, embedding = (getattr(names[n], self.files.naming) for n in ("head", "embedding"))
        if not config.tie_embeddings or head not in self.files.shapes:
            return []
        if not np.array_equal(self.files.read(head), self.files.read(embedding)):
            raise ValueError(
                f"{self.path}: tie_word_embeddings says that {head} is {embedding}, but the file "
                "holds another one. One of them is wrong: if the head was trained apart, set "
                "tie_word_embeddings to false."
            )
        return [re.escape(head)]

    def _check(
        self, names: Mapping[str, TensorName], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """The file must hold exactly the tensors that the config calls for."""
        expected: dict[str, tuple[int, ...]] = {}
        for path, name in names.items():
            for stored, at in name.stored(self.files.naming, shapes[path]).items():
                expected[stored] = name.file_shape(shapes[path][len(at) :], self.files.naming)
        redundant = [*families.named(self.config.family).redundant, *self._tied_head()]
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
    if any(value.get_value().dtype == np.int8 for value in values.values()):
        raise ValueError(f"{path}: int8 weights are for running a teacher; load it without them.")
    for path_in_model, name in families.named(model.config.family).tensors(model.config).items():
        array = np.asarray(values[path_in_model].get_value())
        for stored, at in name.stored("hf", array.shape).items():
            tensors[stored] = name.to_file(array[at], "hf")
    config = model.config.to_hf() | {"torch_dtype": str(model.param_dtype)}
    for file, content in tokenizer_files.items():
        (path / file).write_bytes(content)
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    partial = path / f"{WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    # safetensors lets only the owner read it, whatever the umask says of the others.
    shutil.copymode(path / CONFIG, partial)
    partial.rename(path / WEIGHTS)
