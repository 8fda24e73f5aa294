"""Decoder-only transformers in Flax NNX: families, checkpoints, tokenizers, sharding rules.

The public names are imported on first use, because jax takes seconds to import and the worker
processes that only tokenise do not need it.
"""

if __name__ != "decant.models":
    raise ImportError(
        f"{__file__}: imported as {__name__!r}; write `import decant.models`. Under two names "
        "every class would exist twice."
    )

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decant.models.checkpoints.checkpoint import Checkpoint, open_checkpoint
    from decant.models.checkpoints.saving import save_directory
    from decant.models.config import ModelConfig
    from decant.models.decoder.decoder import Decoder

_HOMES = {
    "Checkpoint": "decant.models.checkpoints.checkpoint",
    "Decoder": "decant.models.decoder.decoder",
    "ModelConfig": "decant.models.config",
    "open_checkpoint": "decant.models.checkpoints.checkpoint",
    "save_directory": "decant.models.checkpoints.saving",
}
__all__ = ["Checkpoint", "Decoder", "ModelConfig", "open_checkpoint", "save_directory"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
