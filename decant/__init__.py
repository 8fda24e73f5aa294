"""Distil language models offline: one pass of the teacher, any number of students from its cache.

`decant.schemas` reads caches, `decant.models` holds the transformers, `decant.pipelines` makes
caches, `decant.trainer` trains students. Nothing is imported before it is asked for: reading a
cache must not need jax, and the command line must answer at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decant.schemas import Cache, open_cache
    from decant.trainer.own_loop.batches import batches
    from decant.trainer.own_loop.losses import loss, loss_on_logits

__all__ = ["Cache", "__version__", "batches", "loss", "loss_on_logits", "open_cache"]
__version__ = "0.8.0"

_HOMES = {
    "Cache": "decant.schemas",
    "batches": "decant.trainer.own_loop.batches",
    "loss": "decant.trainer.own_loop.losses",
    "loss_on_logits": "decant.trainer.own_loop.losses",
    "open_cache": "decant.schemas",
}
_PACKAGES = ("models", "pipelines", "schemas", "trainer")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"decant.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *_PACKAGES]
