"""A disk that fills up while training: one message that says what is safe and how to go on."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from decant.schemas.disk.sizes import size_text
from decant.trainer.run.checkpoint import CHECKPOINTS, latest_step

_FULL = {
    errno.ENOSPC: ("the disk is full", "Free some space"),
    errno.EDQUOT: ("the disk quota is used up", "Free some space"),
    errno.EFBIG: ("a file would exceed the limit on its size", "Raise the limit (ulimit -f)"),
}
"""The fault and the remedy by the system's error number."""
_CODE = re.compile(r"os_error_code='(\d+)'")
"""How TensorStore, which writes checkpoints, tells the system's error number."""
_UNFINISHED = "*.orbax-checkpoint-tmp*"


@contextlib.contextmanager
def full_disk_told(run: Path) -> Iterator[None]:
    """Turn any error of a full disk in the `with` block into one OSError about the run.

    An unfinished checkpoint is deleted: nothing reads it, and its space is needed.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if (number := _number(error)) not in _FULL:
            raise
        why, remedy = _FULL[number]
        for unfinished in (run / CHECKPOINTS).glob(_UNFINISHED):
            shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(
            f"{run}: {why}, so training stopped. {_what_is_safe(run)} {remedy} and run the same "
            "command again: it goes on from there."
        ) from error


def _number(error: Exception) -> int | None:
    """The system's number for the error; None if it has none."""
    if isinstance(error, OSError):
        return error.errno
    found = _CODE.search(str(error))
    return int(found[1]) if found else None


def _what_is_safe(run: Path) -> str:
    if not (step := latest_step(run)):
        return "It had no checkpoint yet."
    files = (run / CHECKPOINTS / str(step)).rglob("*")
    size = sum(path.stat().st_size for path in files if path.is_file())
    return f"Its checkpoint after update {step}, of {size_text(size)}, is safe."
