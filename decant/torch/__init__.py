"""For PyTorch: a cache's rows as tensors, the losses, and a trainer for Hugging Face models.

Needs torch, numpy and what reads a cache; no jax. `DistillationTrainer` needs transformers and
accelerate too.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decant.torch.batching import Batches, batches
    from decant.torch.hf_trainer import DistillationTrainer
    from decant.torch.judging import evaluate
    from decant.torch.layer_terms import attention_loss, hidden_loss, pair_count
    from decant.torch.losses import loss, loss_on_logits
    from decant.torch.packing import attention_mask, packed_inputs, require_separate_segments
    from decant.torch.rows import Batch, Rows
    from decant.torch.sketches import SketchTables, sketch_tables

_HOMES = {
    "Batch": "rows",
    "Batches": "batching",
    "DistillationTrainer": "hf_trainer",
    "Rows": "rows",
    "SketchTables": "sketches",
    "attention_loss": "layer_terms",
    "attention_mask": "packing",
    "batches": "batching",
    "evaluate": "judging",
    "hidden_loss": "layer_terms",
    "loss": "losses",
    "loss_on_logits": "losses",
    "packed_inputs": "packing",
    "pair_count": "layer_terms",
    "require_separate_segments": "packing",
    "sketch_tables": "sketches",
}
__all__ = [
    "Batch",
    "Batches",
    "DistillationTrainer",
    "Rows",
    "SketchTables",
    "attention_loss",
    "attention_mask",
    "batches",
    "evaluate",
    "hidden_loss",
    "loss",
    "loss_on_logits",
    "packed_inputs",
    "pair_count",
    "require_separate_segments",
    "sketch_tables",
]


def _require(package: str, install: str) -> None:
    if find_spec(package) is None:
        needs = f"decant.torch needs {package}: pip install {install}"
        raise ModuleNotFoundError(needs, name=package)


_require("torch", "torch")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "DistillationTrainer":
        _require("transformers", "transformers accelerate")
        _require("accelerate", "accelerate")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
