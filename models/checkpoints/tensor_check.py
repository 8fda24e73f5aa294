"""Checking that a checkpoint's files hold exactly the tensors that its config calls for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from decant.models.checkpoints.gguf_file import GgufFile
from decant.models.checkpoints.peft_files import PeftFiles
from decant.models.checkpoints.safetensors_files import SafetensorsFiles
from decant.models.families import family_of, tensor_names


def check_tensors(
    files: SafetensorsFiles | GgufFile | PeftFiles, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError, listing every difference, unless names and shapes are as expected.

    `shapes` has the shape of each of our parameters by path, stacked axes included.
    """
    config = files.config
    family = family_of(config)
    expected: dict[str, tuple[int, ...]] = {}
    for path, name in tensor_names(config, files.naming, files.shapes).items():
        for tensor, at in name.file_tensors(files.naming, shapes[path]).items():
            expected[tensor] = name.file_shape(shapes[path][len(at) :], files.naming)
    redundant = [p.replace("{layers}", str(config.num_layers)) for p in family.redundant]
    redundant += _tied_head(files)
    present = {
        name: shape
        for name, shape in files.shapes.items()
        if name in expected or not any(re.fullmatch(pattern, name) for pattern in redundant)
    }
    extra = [n for n in present if n not in expected and not _bias_of_zeros(files, n)]
    problems = [f"missing: {n} {expected[n]}" for n in expected if n not in present]
    problems += [f"not expected: {n} {present[n]}" for n in extra]
    problems += [
        f"misshapen: {n} is {present[n]}, expected {expected[n]}"
        for n in expected
        if n in present and present[n] != expected[n]
    ]
    problems += [
        f"not readable: {n} is stored as {files.kinds[n]}, not one of {' '.join(files.readable)}"
        for n in expected
        if n in present and files.kinds[n] not in files.readable
    ]
    if problems:
        more = [f"… and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ValueError(
            f"{files.where}: tensors do not fit the config (a family "
            f"'{config.family}' model of {config.num_layers} layers):\n  "
            + "\n  ".join(problems[:10] + more)
        )


def _bias_of_zeros(files: SafetensorsFiles | GgufFile | PeftFiles, name: str) -> bool:
    """Whether it is a bias that adds nothing. AutoGPTQ gives every linear map one."""
    bias = name.endswith(".bias") and files.kinds[name] in files.readable
    return bias and not files.read(name).any()


def _tied_head(files: SafetensorsFiles | GgufFile | PeftFiles) -> list[str]:
    """The pattern of a head that the files of a tied model hold as well, if they do.

    ValueError if that head differs from the embedding.
    """
    config = files.config
    untied = dataclasses.replace(config, tie_embeddings=False)
    names = tensor_names(untied, files.naming, files.shapes)
    head, embedding = (getattr(names[n], files.naming) for n in ("head", "embedding"))
    if not config.tie_embeddings or head not in files.shapes:
        return []
    if not np.array_equal(files.read(head), files.read(embedding)):
        raise ValueError(
            f"{files.where}: tie_word_embeddings says that {head} is {embedding}, but the file "
            "holds another one. One of them is wrong: if the head was trained apart, set "
            "tie_word_embeddings to false."
        )
    return [re.escape(head)]
