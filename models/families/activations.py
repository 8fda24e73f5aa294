"""Names of activations in config.json."""

from __future__ import annotations

from typing import Literal

from decant.models.families.field_reader import FieldReader

_BY_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def read_gelu(reader: FieldReader, name: str, default: str) -> Literal["gelu", "gelu_tanh"]:
    """GELU, or its approximation by tanh, for which there are three names."""
    reader.require(name, *dict.fromkeys((default, "gelu", *_BY_TANH)))
    return "gelu_tanh" if reader.take(name, default) in _BY_TANH else "gelu"
