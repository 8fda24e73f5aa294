"""Which code trains: what a run that goes on is held to, as to its data and settings."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from pathlib import Path

PACKAGES = ("schemas", "models", "trainer")
"""Whose sources decide what an update does."""


@functools.cache
def code_version() -> str:
    """`0.5.0 1a2b3c4d5e6f`: the release, if it is installed, and a hash of the sources."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    try:
        release = importlib.metadata.version("decant") + " "
    except importlib.metadata.PackageNotFoundError:
        release = ""  # a checkout
    return release + digest.hexdigest()[:12]
