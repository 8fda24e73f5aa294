"""Reads the initial student that a run's directory keeps; `initial_student.py` makes it."""

from __future__ import annotations

from pathlib import Path

from jax.sharding import Mesh

from decant.models import Checkpoint, Decoder, open_checkpoint
from decant.models.checkpoints.adapters import add_adapter
from decant.schemas.disk.atomic import read_json
from decant.schemas.disk.identity import file_sha256
from decant.trainer.run.adapter import open_base, read_adapter
from decant.trainer.run.binding import read_run_settings

INITIAL = "initial"
CHECKSUMS = "checksums.json"
"""In that directory: the sha256 of each of its files."""
WEIGHTS_SUFFIX = ".safetensors"


def load_initial_student(
    run: Path, *, dtype: str, mesh: Mesh | None = None, source: str | None = None
) -> Decoder:
    """The initial student from a run's directory, with its new adapter if it has one.

    `dtype` is the compute type; trained weights are float32. `source` is where an adapter's base
    lies (None: where the run says). FileNotFoundError if `run` holds no run, ValueError for a base
    that is not the run's.
    """
    checkpoint = open_initial(run)
    _require_intact(run / INITIAL, weights=True)
    adapter = read_adapter(run / INITIAL)
    if adapter is None:
        return checkpoint.load(dtype=dtype, param_dtype="float32", mesh=mesh)
    if adapter.base:
        source = source or str(read_run_settings(run)["student.source"])
        checkpoint = open_base(adapter, source, run=run)
    model = checkpoint.load(dtype=dtype, param_dtype=adapter.dtype, mesh=mesh)
    add_adapter(model, adapter.lora, seed=adapter.seed, mesh=mesh)
    return model


def open_initial(run: Path) -> Checkpoint:
    """The initial student's config and tokenizer; `load_initial_student` reads its weights.

    FileNotFoundError if `run` holds no run, ValueError for a file that has changed.
    """
    directory = run / INITIAL
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: not there; {run} is not the directory of a run")
    _require_intact(directory, weights=False)
    return open_checkpoint(directory)


def _require_intact(directory: Path, *, weights: bool) -> None:
    """ValueError if the weights, or all other files, are not those that were written.

    Runs of 0.7 and older have no checksums.
    """
    if not (directory / CHECKSUMS).exists():
        return
    for name, sha256 in read_json(directory / CHECKSUMS).items():
        path = directory / name
        if (path.suffix == WEIGHTS_SUFFIX) == weights and file_sha256(path) != sha256:
            raise ValueError(f"{path}: damaged or edited since the run began; bring a copy back")
