"""Noticing an accelerator that this installation of jax cannot use."""

import shutil
from pathlib import Path

import jax


def unused_accelerator() -> str | None:
    """What to say when there is an accelerator here but jax runs on the CPU; None if all is well.

    The commonest cause of a job that takes days instead of hours is an environment made for CPU.
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
