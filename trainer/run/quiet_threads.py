"""Keeps threads that write a checkpoint from printing what the raised error says already."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """Silence Orbax's and TensorStore's threads, which print every consequence of a failed write.

    After an error they stay silent, because they go on after the `with` block. The error itself is
    raised from the block as usual.
    """
    hook = sys.unraisablehook
    levels = {name: logging.getLogger(name).level for name in ("absl", "asyncio")}

    def but_closed_loops(unraisable: sys.UnraisableHookArgs) -> None:
        # TensorStore reports each write that ends after the first failure to a closed event loop.
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = but_closed_loops
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    sys.unraisablehook = hook
