"""The tensors of models whose modules all have biases and names of their own: GPT-2, GPT-NeoX."""

from __future__ import annotations

from collections.abc import Mapping

from decant.models.config import ModelConfig
from decant.models.families.common_tensors import matrices_with_bias
from decant.models.families.tensor_name import TensorName

_IN_AXES = {"query": 1, "key": 1, "value": 1, "output": 2, "up": 1, "down": 1}
"""Matrices of a block that are not gated, and how many axes their input has."""


def module_tensors(
    config: ModelConfig, modules: Mapping[str, tuple[str, str]], *, input_first: bool = False
) -> dict[str, TensorName]:
    """Weights and biases of modules by path.

    Args:
        config: says which matrices have a bias; all norms have one.
        modules: parameter ("blocks.query") → patterns of its module in Hugging Face and GGUF files.
            A pattern without GGUF's name is empty.
        input_first: Hugging Face files store matrices as [input, output].
    """
    names = {}
    for path, (hf, gguf) in modules.items():
        name = path.rpartition(".")[2]
        in_axes = _IN_AXES.get(name)
        first = input_first and in_axes is not None
        names[path] = _tensor(hf, gguf, "weight", in_axes=in_axes, input_first=first)
        if name in matrices_with_bias(config) or name.endswith("norm"):
            names[f"{path}_bias"] = _tensor(hf, gguf, "bias", in_axes=0)
    return names


def _tensor(
    hf: str, gguf: str, kind: str, *, in_axes: int | None, input_first: bool = False
) -> TensorName:
    return TensorName(
        f"{hf}.{kind}", f"{gguf}.{kind}" if gguf else "", in_axes, input_first=input_first
    )
