"""Keeping compiled programs, so that a run that goes on, or the next one, starts at once."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import jax

DIRECTORY = "compiled"


def keep_compiled(run: Path) -> None:
    """Keep them beside the run's directory, where its neighbours look too.

    JAX_COMPILATION_CACHE_DIR, if set, is obeyed instead. A program found there is the one that was
    stored, so a run gives the same bits with it as without.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        directory = run.absolute().parent / DIRECTORY / _processor()
        jax.config.update("jax_compilation_cache_dir", str(directory))


def _processor() -> str:
    """What code for the host depends on: a directory may be shared by unlike machines."""
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    digest = hashlib.sha256(f"{flags} {platform.processor()}".encode()).hexdigest()
    return f"{platform.machine()}-{digest[:8]}"
