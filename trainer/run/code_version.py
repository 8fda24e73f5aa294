"""The version of the training code; `run.json` records it, and a continued run must match it."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import decant

PACKAGES = ("schemas", "models", "trainer")
"""Packages whose sources, with `command_line/settings.py`, decide what an update computes."""


@functools.cache
def code_version() -> str:
    """`0.8.0 1a2b3c4d5e6f`: the release and a hash of the sources."""
    root = Path(decant.__file__).parent
    paths = [root / "command_line" / "settings.py"]
    for package in PACKAGES:
        paths += (root / package).rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{decant.__version__} {digest.hexdigest()[:12]}"
