"""Detecting an accelerator that this installation of jax cannot use."""

import shutil
from pathlib import Path

import jax


def unused_accelerator() -> str | None:
    """A warning with the remedy if the machine has an accelerator but jax runs on the CPU, or None.

    A CPU-only environment is the commonest cause of a job that takes days instead of hours.
    """
    if jax.default_backend() != "cpu":
        return None
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        kind, remedy = "an NVIDIA GPU", "cuda13 (driver ≥ 580) or ACCEL=cuda12"
    elif Path("/dev/accel0").exists():
        kind, remedy = "a TPU", "tpu"
    else:
        return None
    return (
        f"This machine seems to have {kind}, but jax {jax.__version__} runs on the CPU only. "
        f"To use it: make setup ACCEL={remedy}, then run this again with the same ACCEL."
    )
