"""The index of a Hugging Face directory: which of its files holds each tensor."""

from __future__ import annotations

import re
from pathlib import Path

from decant.models.checkpoints.hf_layout import INDEX
from decant.models.families.field_reader import shown
from decant.models.json_file import read_object

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors", re.ASCII)


def read_index(directory: Path) -> dict[str, str]:
    """Tensor → name of its file, which lies in the directory itself.

    ValueError for another name: an index must not lead out of its directory.
    """
    weight_map = read_object(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{directory / INDEX}: no weight_map, which says where tensors are.")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _NAME.fullmatch(file):
            raise ValueError(
                f"{directory / INDEX}: tensor {shown(tensor)} is in {shown(file)}; expected the "
                "name of a .safetensors file in the same directory."
            )
    return weight_map
