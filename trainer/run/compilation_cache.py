"""Compiled programs on disk, so that a continued run, or another one, need not compile again."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import jax

DIRECTORY = "compiled"


def keep_compiled_programs(run: Path) -> None:
    """Let jax store compiled programs beside the run's directory, shared by the runs there.

    Does nothing if JAX_COMPILATION_CACHE_DIR is set. A program that is loaded is the one that was
    stored, so results are the same to the bit with and without this cache.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        directory = run.absolute().parent / DIRECTORY / _processor()
        jax.config.update("jax_compilation_cache_dir", str(directory))


def _processor() -> str:
    """Architecture and a hash of the processor's features: machines may share the directory."""
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    digest = hashlib.sha256(f"{flags} {platform.processor()}".encode()).hexdigest()
    return f"{platform.machine()}-{digest[:8]}"
