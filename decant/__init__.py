"""Distil language models offline: one pass of the teacher, any number of students from its cache.

`decant.schemas` reads caches, `decant.models` holds the transformers, `decant.pipelines` makes
caches, `decant.trainer` trains students. Nothing is imported before it is asked for: reading a
cache must not need jax, and the command line must answer at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decant.library import evaluate_run, generate, precompute, train
    from decant.pipelines.config import Precompute as PrecomputeConfig
    from decant.schemas import Cache, open_cache
    from decant.trainer.config import Evaluate as EvaluateConfig
    from decant.trainer.config import Train as TrainConfig
    from decant.trainer.own_loop.batches import batches
    from decant.trainer.own_loop.evaluate import evaluate
    from decant.trainer.own_loop.losses import loss, loss_on_logits

__all__ = [
    "Cache",
    "EvaluateConfig",
    "PrecomputeConfig",
    "TrainConfig",
    "__version__",
    "batches",
    "evaluate",
    "evaluate_run",
    "generate",
    "loss",
    "loss_on_logits",
    "open_cache",
    "precompute",
    "train",
]
__version__ = "0.16.4"

_HOMES = {
    "Cache": ("decant.schemas", "Cache"),
    "EvaluateConfig": ("decant.trainer.config", "Evaluate"),
    "PrecomputeConfig": ("decant.pipelines.config", "Precompute"),
    "TrainConfig": ("decant.trainer.config", "Train"),
    "batches": ("decant.trainer.own_loop.batches", "batches"),
    "evaluate": ("decant.trainer.own_loop.evaluate", "evaluate"),
    "evaluate_run": ("decant.library", "evaluate_run"),
    "generate": ("decant.library", "generate"),
    "loss": ("decant.trainer.own_loop.losses", "loss"),
    "loss_on_logits": ("decant.trainer.own_loop.losses", "loss_on_logits"),
    "open_cache": ("decant.schemas", "open_cache"),
    "precompute": ("decant.library", "precompute"),
    "train": ("decant.library", "train"),
}
_PACKAGES = ("models", "pipelines", "schemas", "trainer")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"decant.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, *_PACKAGES]
