"""Writing a model as a Hugging Face directory."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from decant.models.checkpoints.hf_layout import CONFIG, WEIGHTS
from decant.models.config import ModelConfig
from decant.models.decoder.decoder import Decoder
from decant.models.families import config_to_json, family_of
from decant.models.parameters import parameters_by_path


def save_directory(
    model: Decoder,
    path: Path | str,
    tokenizer_files: Mapping[str, bytes],
    *,
    special_ids: Mapping[str, int | list[int]] | None = None,
) -> None:
    """Write a Hugging Face directory that `open_checkpoint` and transformers read.

    Weights keep their dtype. The weights file appears last, and only when it is complete.
    ValueError for int8 weights, and for a config that its family's config.json cannot express;
    OSError if the disk is full.

    Args:
        model: its config, weights and `param_dtype` are written.
        path: the directory; it is made if needed.
        tokenizer_files: contents by file name, as `Tokenizer.files` gives them.
        special_ids: more entries of config.json, such as `eos_token_id`.
    """
    path = Path(path)
    tensors: dict[str, np.ndarray] = {}
    values = parameters_by_path(model)
    if any(value.get_value().dtype == np.int8 for value in values.values()):
        raise ValueError(f"{path}: int8 weights are for running a teacher; load it without them.")
    for path_in_model, name in family_of(model.config).tensors(model.config).items():
        array = np.asarray(values[path_in_model].get_value())
        for tensor, at in name.file_tensors("hf", array.shape).items():
            tensors[tensor] = name.to_file(array[at], "hf", tensors.get(tensor))
    more = {"torch_dtype": str(model.param_dtype), **(special_ids or {})}
    save_shape(model.config, path, tokenizer_files, more=more)
    write_tensors(tensors, path / WEIGHTS, like=path / CONFIG)


def save_shape(
    config: ModelConfig,
    path: Path,
    tokenizer_files: Mapping[str, bytes],
    *,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a Hugging Face directory without weights; `more` are more entries of config.json."""
    path.mkdir(parents=True, exist_ok=True)
    for file, content in tokenizer_files.items():
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_bytes(content)
    fields = {**config_to_json(config), **more}
    (path / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", "utf-8")


def write_tensors(tensors: dict[str, np.ndarray], path: Path, *, like: Path) -> None:
    """Write a safetensors file that appears when it is complete, with the mode of the file `like`.

    OSError if the disk is full.
    """
    partial = path.with_name(f"{path.name}.partial")
    _write(tensors, partial)
    # safetensors makes a file that only its owner can read, whatever the umask.
    shutil.copymode(like, partial)
    partial.rename(path)


def _write(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write a safetensors file. OSError if the system refuses; then no file is left."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
