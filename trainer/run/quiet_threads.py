"""Keeps Orbax and TensorStore from printing what the raised error says already."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint

_ORBAX = str(Path(orbax.checkpoint.__file__).parent)
_LOGGERS = ("absl", "asyncio")


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """Silence every consequence of a failed read or write but the error that the block raises.

    After an error it stays silent, because threads go on after the `with` block, and coroutines
    that never ran end when Python next collects garbage.
    """
    hook = sys.unraisablehook
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not isinstance(hook, _ButConsequences):
        sys.unraisablehook = _ButConsequences(hook)
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    sys.unraisablehook = hook


class _ButConsequences:
    """Python's hook for errors that cannot be raised, without those that follow from another."""

    def __init__(self, hook: Callable[[sys.UnraisableHookArgs], Any]):
        self._hook = hook

    def __call__(self, unraisable: sys.UnraisableHookArgs) -> None:
        # TensorStore reports each write that ends after the first failure to a closed event loop.
        if str(unraisable.exc_value) == "Event loop is closed":
            return
        # Orbax turns the GeneratorExit of each read that it abandons into an error.
        code = getattr(unraisable.object, "cr_code", None)
        if code is not None and code.co_filename.startswith(_ORBAX):
            return
        self._hook(unraisable)
