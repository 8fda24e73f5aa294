"""Model families: how each one's files spell a config and name its parameters."""

from decant.models.families.registry import (
    config_from_file,
    config_from_gguf,
    config_from_json,
    config_to_json,
    family_of,
    tensor_names,
)

__all__ = [
    "config_from_file",
    "config_from_gguf",
    "config_from_json",
    "config_to_json",
    "family_of",
    "tensor_names",
]
