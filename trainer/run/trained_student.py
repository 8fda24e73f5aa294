"""A run's trained student: its graph and the parameters of one of its checkpoints."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from decant.models.checkpoints.adapters import merged_arrays
from decant.models.decoder.decoder import Decoder
from decant.models.mesh.sharding import student_mesh
from decant.trainer.loss.frozen import joined, trained_and_frozen
from decant.trainer.loss.projections import (
    saved_projections,
    without_projections,
)
from decant.trainer.run.checkpoint import Checkpoints
from decant.trainer.run.checksums import require_finite, summarise
from decant.trainer.run.saved_initial import INITIAL, load_initial_student
from decant.trainer.run.student_parameters import graph_and_all_parameters


def load_student(
    run: Path, *, dtype: str, checkpoint: str = "last", mesh: Mesh | None = None
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Graph and parameters of a run's student, without projections; see `load_checkpoint`."""
    graph, params, _ = load_checkpoint(run, dtype=dtype, checkpoint=checkpoint, mesh=mesh)
    return graph, params


def load_checkpoint(
    run: Path, *, dtype: str, checkpoint: str = "last", mesh: Mesh | None = None
) -> tuple[nnx.GraphDef, dict[str, Any], int]:
    """Graph and parameters of a run's student, and the number of updates that made them.

    `dtype` is the compute type; trained weights are float32. `checkpoint` is `last` (the newest
    good one, or the initial student if the run has none yet), `best`, `best-ce` or a number of
    updates.
    Parameters are without projections, on `mesh` or sharded over all devices. Raises ValueError if
    there is no such checkpoint or it is damaged, FloatingPointError if the initial student is not
    finite.
    """
    # Sharded, because a student that a mesh has trained may not fit one device.
    mesh = mesh or student_mesh(fsdp=jax.device_count())
    model = load_initial_student(run, dtype=dtype, mesh=mesh)
    graph, params = graph_and_all_parameters(model, saved_projections(run), mesh=mesh)
    params, frozen = trained_and_frozen(params)
    checkpoints = Checkpoints(run, read_only=True)
    step = checkpoints.named_step(checkpoint)
    if step is not None and checkpoint == "last":
        params, step = checkpoints.restore_newest_parameters(params)
    elif step is not None:
        params = checkpoints.restore_parameters(params, step=step)
    checkpoints.close()
    if step is None:
        require_finite(summarise(params), where=f"{run / INITIAL}")
    return graph, joined(without_projections(params), frozen), step or 0


def weights_sha256(params: dict[str, Any]) -> str:
    """sha256 over all parameters, with their names and shapes: tells which weights were judged."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(array.view(np.uint8).data)  # Python has no buffers of bfloat16
    return found.hexdigest()


def student_digest(model: Decoder) -> str:
    """sha256 that names what a student computes: its parameters in float32, an adapter merged.

    It stays the same when the student is exported and another run begins with it, so rollouts name
    their writer by it. All weights are read to the host, one array at a time.
    """
    found = hashlib.sha256()
    for path, array in merged_arrays(model):
        found.update(f"{path} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()
