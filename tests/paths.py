"""Paths of the checkout and its golden files; the environment of processes that tests start."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


def environment() -> dict[str, str]:
    """This process's environment, with the checkout on Python's path."""
    return os.environ | {"PYTHONPATH": str(ROOT)}
