"""The interface of a model family: how its files spell a config and name each parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families.tensor_name import Naming, TensorName

ROPE_TENSORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
"""Tensors of GGUF files that describe rotary positions, without `.weight`."""


@dataclasses.dataclass(frozen=True)
class GgufFormat:
    """How a family's GGUF files differ from those of other families."""

    architecture: str
    """The value of `general.architecture`."""
    config: Callable[[Mapping[str, Any], Collection[str]], ModelConfig]
    """(metadata, names of the file's tensors) → config. Beside the file's own metadata there may be
    `tokens`, the tokenizer's size, and the values of the tensors in `ROPE_TENSORS` by name."""
    interleaves_rotary: bool = False
    """Rows of the tensors marked `TensorName.rotary` are interleaved within each head."""
    norms_with_one: bool = False
    """Files hold 1 + weight of each norm, of families whose norms add one to it."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One family. A ValueError of its functions names the field and its file."""

    name: str
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json."""
    config_from_json: Callable[[Mapping[str, Any]], ModelConfig]
    config_to_json: Callable[[ModelConfig], dict[str, Any]]
    tensors: Callable[[ModelConfig], dict[str, TensorName]]
    """Path of each of our parameters ("blocks.query") → its name in files."""
    gguf: GgufFormat | None = None
    """None: we read no GGUF files of this family."""
    redundant: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq", r"rope_freqs\.weight")
    """Regular expressions: tensors that a file may hold although the config determines them or the
    model's output does not depend on them. `{layers}` stands for the number of blocks."""
    tensors_in: Callable[[ModelConfig, Naming, Collection[str]], dict[str, TensorName]] | None = (
        None
    )
    """As `tensors`, for files with one naming whose tensors have these names. None: `tensors`,
    whatever the files hold."""
    optional_prefix: str = ""
    """Names of tensors in Hugging Face files begin with it, unless the model was saved without its
    head."""
