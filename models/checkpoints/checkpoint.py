"""A checkpoint on disk, opened by name: its config, its tokenizer, and its weights as a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from decant.models.checkpoints import embedded, hub
from decant.models.checkpoints.gguf_file import GgufFile
from decant.models.checkpoints.loading import place_shares, read_share
from decant.models.checkpoints.peft_files import PeftFiles, is_adapter, place_of_base
from decant.models.checkpoints.quantization import (
    MATRICES,
    SCALE,
    abstract_int8,
    input_axes,
    int8_codes,
    int8_scales,
)
from decant.models.checkpoints.safetensors_files import SafetensorsFiles
from decant.models.checkpoints.tensor_check import check_tensors
from decant.models.checkpoints.weight_files import BucketFiles, LocalFiles, file_in_bucket
from decant.models.config import ModelConfig
from decant.models.decoder.decoder import Decoder
from decant.models.families import family_of, tensor_names
from decant.models.families.tensor_name import TensorName
from decant.models.mesh import sharding
from decant.models.numerics import dtype_named
from decant.models.parameters import parameters_by_path
from decant.models.prequantised.stored import Index, full_index
from decant.models.text.tokenizer import Tokenizer
from decant.store.urls import BUCKETS, require_scheme, url_of

Quantize = Literal["none", "int8"]
_NO_BASE = "its base is {}; expected a Hugging Face directory of a whole model, or its hub id"


def open_checkpoint(name: str | Path, *, fetch: bool = True) -> Checkpoint:
    """Open a checkpoint; its weights are not read yet.

    `name` is "embedded", a Hugging Face directory or a .gguf file, here or at an `s3://` or `gs://`
    address, or a hub id (`hub.HubId`). A PEFT directory opens as its base with the adapter
    merged into it. A path that exists takes precedence over a hub id. With
    `fetch` False nothing is asked of a network: a hub id must have been fetched before.
    FileNotFoundError if it is none of these. ValueError for another address, StoreError if the
    bucket refuses or cannot be reached.
    """
    require_scheme(name, BUCKETS, name="the checkpoint")
    if url := url_of(name):
        return _open_in_bucket(url.rstrip("/"), fetch=fetch)
    path = embedded.embedded_gguf() if str(name) == embedded.NAME else Path(name)
    hub_id = None if path.exists() else hub.HubId.parse(str(name))
    if hub_id:
        fetched = hub.fetch_checkpoint(hub_id, fetch=fetch)
        return dataclasses.replace(open_checkpoint(fetched.path), name=fetched.pinned)
    if path.is_dir():
        return Checkpoint(str(name), path, _of_directory(LocalFiles(path), fetch=fetch))
    if path.suffix == ".gguf":
        return Checkpoint(str(name), path, GgufFile(path))
    raise FileNotFoundError(
        f"checkpoint {str(name)!r}: expected 'embedded', a Hugging Face directory, a .gguf file or "
        f"a hub id; {path} is {'a file of another kind' if path.exists() else 'not there'}."
    )


def _open_in_bucket(url: str, *, fetch: bool) -> Checkpoint:
    if not fetch:
        raise FileNotFoundError(f"{url}: lies in a bucket.")
    if url.endswith(".gguf"):
        gguf = GgufFile(file_in_bucket(url))
        return Checkpoint(url, gguf.path, gguf)
    files = _of_directory(BucketFiles(url), fetch=fetch)
    return Checkpoint(url, files.path, files)


def _of_directory(place: LocalFiles | BucketFiles, *, fetch: bool) -> SafetensorsFiles | PeftFiles:
    if not is_adapter(place):
        return SafetensorsFiles(place)
    name = place_of_base(place)
    if is_adapter(LocalFiles(Path(name))):  # it may name itself
        raise ValueError(f"{place.where}: {_NO_BASE.format(name)}")
    try:
        base = open_checkpoint(name, fetch=fetch).files
    except OSError as error:
        raise FileNotFoundError(f"{place.where}: the base of this adapter: {error}") from error
    if not isinstance(base, SafetensorsFiles):
        raise ValueError(f"{place.where}: {_NO_BASE.format(name)}")
    return PeftFiles(place, base)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its config, tokenizer and weights, each read when asked for."""

    name: str
    """`open_checkpoint(name)` opens the same weights again: a hub id has its commit here."""
    path: Path
    """Directory of config and tokenizer, of an address with copies of them; or the .gguf file, of
    an address as its name alone."""
    files: SafetensorsFiles | GgufFile | PeftFiles

    @property
    def title(self) -> str:
        """The name people know it by: the hub id without its commit, or the file's own name."""
        return hub.without_commit(self.name) or self.path.name

    @property
    def left_out(self) -> str:
        """A line on the tensors of other parts than the text model; empty if there are none."""
        if not (names := self.files.unread):
            return ""
        return (
            f"{self.title} is a model of images and text: its text model is run, and "
            f"{len(names):,} tensors of other parts are not read"
        )

    @property
    def config(self) -> ModelConfig:
        """Shape of the model. ValueError for a field that we cannot honour."""
        return self.files.config

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. The embedding may lack rows for its last ids (Gemma 3)."""
        return self.files.tokenizer()

    def abstract(
        self,
        *,
        dtype: str = "float32",
        param_dtype: str | None = None,
        quantize: Quantize = "none",
    ) -> Decoder:
        """The decoder that `load` returns, with shapes and dtypes in place of its weights."""
        compute, kept = dtype_named(dtype), dtype_named(param_dtype or dtype)
        model = nnx.eval_shape(
            lambda: Decoder(self.config, rngs=nnx.Rngs(0), dtype=compute, param_dtype=kept)
        )
        if quantize == "int8":
            for name in self.config.stacks:
                abstract_int8(getattr(model, name), self._inputs)
        return model

    def load(
        self,
        *,
        dtype: str = "float32",
        param_dtype: str | None = None,
        quantize: Quantize = "none",
        mesh: Mesh | None = None,
    ) -> Decoder:
        """Read the weights into a decoder.

        ValueError if the files do not hold exactly the tensors that the config calls for.

        Args:
            dtype: what matrix products take, "float32" or "bfloat16".
            param_dtype: how weights are kept; `dtype` if None.
            quantize: "int8" keeps the blocks' matrices as int8 codes with float32 scales.
            mesh: if given, the rules of `mesh/sharding.py` place the weights on it, and each
                device's share is read straight from the files.
        """
        model = self.abstract(dtype=dtype, param_dtype=param_dtype, quantize=quantize)
        ours = parameters_by_path(model)
        shapes = {path: p.get_value().shape for path, p in ours.items()}
        check_tensors(self.files, shapes)
        places = {} if mesh is None else sharding.parameter_shardings(model, mesh)

        def set_value(path: str, read: Callable[[Index], np.ndarray]) -> None:
            shape = shapes[path]
            if places:
                ours[path].set_value(place_shares(read, shape, places[path]))
            else:
                ours[path].set_value(jnp.asarray(read(full_index(shape))))

        for path in self._names:
            kept_dtype = ours[path].get_value().dtype
            if kept_dtype != np.int8:
                set_value(path, partial(self._share, path, shapes[path], dtype=kept_dtype))
                continue
            scales = self._scales(path, shapes[path], ours[path].get_metadata()["axes"])
            set_value(path + SCALE, scales.__getitem__)
            set_value(path, partial(self._codes, path, shapes[path], ours[path], scales))
        return model

    @cached_property
    def _names(self) -> dict[str, TensorName]:
        return tensor_names(self.config, self.files.naming, self.files.shapes)

    @cached_property
    def _inputs(self) -> dict[str, int]:
        """Matrix of the blocks ("query") → how many axes its input has."""
        of_blocks = {path.rpartition(".")[2]: tensor for path, tensor in self._names.items()}
        matrices = {name: of_blocks.get(name) for name in MATRICES}
        return {name: tensor.in_axes or 0 for name, tensor in matrices.items() if tensor}

    def _share(
        self, path: str, shape: tuple[int, ...], index: Index, *, dtype: Any = np.float32
    ) -> np.ndarray:
        """The elements at `index` of the parameter at `path`, whose whole shape is `shape`."""
        gguf = family_of(self.config).gguf if self.files.naming == "gguf" else None
        read = self.files.read
        if gguf is not None and gguf.norms_with_one and "norm" in path:
            read = partial(_less_one, read)
        return read_share(
            read,
            self._names[path],
            shape,
            index,
            naming=self.files.naming,
            dtype=dtype,
            interleaved=gguf is not None and gguf.interleaves_rotary,
        )

    def _scales(self, path: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> np.ndarray:
        """Scales of a whole int8 matrix, read a layer at a time; `axes` are its logical axes.

        They are taken over the whole matrix so that they are the same on every mesh.
        """
        over = input_axes(axes, inputs=self._inputs[path.rpartition(".")[2]])
        layers = [
            int8_scales(
                self._share(path, shape, (slice(i, i + 1), *full_index(shape[1:]))), over=over
            )
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
        """int8 codes at `index` of a matrix; `scales` are those of the whole matrix."""
        axes = parameter.get_metadata()["axes"]
        over = input_axes(axes, inputs=self._inputs[path.rpartition(".")[2]])
        share_scales = scales[tuple(at for i, at in enumerate(index) if i not in over)]
        codes = np.empty([at.stop - at.start for at in index], np.int8)
        for i, layer in enumerate(range(index[0].start, index[0].stop)):
            matrix = self._share(path, shape, (slice(layer, layer + 1), *index[1:]))
            codes[i : i + 1] = int8_codes(matrix, share_scales[i : i + 1], over=over)
        return codes


def _less_one(
    read: Callable[[str, Index | None], np.ndarray], name: str, index: Index | None
) -> np.ndarray:
    return read(name, index) - np.float32(1)
