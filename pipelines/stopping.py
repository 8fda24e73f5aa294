"""Ctrl-C and SIGTERM stop a command, wherever in Python they arrive."""

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

_AGAIN_SECONDS = 0.05


@contextlib.contextmanager
def stopping(stopped_by: list[int]) -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, which batch schedulers send, as on Ctrl-C.

    The number of each SIGTERM is appended to `stopped_by`. Outside the main thread, where Python
    does not let a handler be set, signals stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        stopped_by.append(number)
        raise KeyboardInterrupt

    def ignored(unraisable: "sys.UnraisableHookArgs") -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook_before(unraisable)
            return
        # Python swallows an exception in a finaliser or in a weak reference's callback, so the
        # command went on. Raise it again from a timer, because this hook runs inside the callback.
        number = stopped_by[0] if stopped_by else signal.SIGINT
        threading.Timer(_AGAIN_SECONDS, _thread.interrupt_main, [number]).start()

    before, hook_before = signal.signal(signal.SIGTERM, stop), sys.unraisablehook
    sys.unraisablehook = ignored
    try:
        yield
    finally:
        sys.unraisablehook = hook_before
        signal.signal(signal.SIGTERM, before)
