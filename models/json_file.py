"""Reading a JSON object from a file that somebody else wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LARGEST = 64 << 20
"""Bytes. The index of a checkpoint with 100,000 tensors takes about 10 MB."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. FileNotFoundError, or ValueError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (from {Path.cwd()}).")
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes; expected at most {_LARGEST:,}.")
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    # ValueError: not UTF-8, not JSON, or an integer of thousands of digits.
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path}: not valid JSON: {reason}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value
