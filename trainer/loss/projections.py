"""Linear maps from the student's hidden states to the teacher's, trained with the student.

While training they are parameters beside the student's own, so that they are optimised, saved and
restored with it. Evaluation and export drop them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from decant.schemas.disk.atomic import write_bytes
from decant.trainer.loss.layer_pairs import Pairs

FILE = "projections.safetensors"
PROJECTIONS = "projections"
"""Key of the projections among the parameters, beside the student's `blocks`."""

Parameters = dict[str, Any]
"""The student's arrays in nested dicts; projections, if there are any, under `PROJECTIONS`."""


def initial_projections(pairs: Pairs, *, width: int, run: Path, seed: int) -> dict[str, np.ndarray]:
    """The initial projections [width, stored] of a run, by name.

    They are read from the run's directory, or made and saved there if the run begins. Entries are
    normal with variance 1/width, so that states keep their size. `width` is the student's.
    """
    if (run / FILE).exists():
        return saved_projections(run)
    projections = {}
    for term in pairs.hidden:
        for pair in term:
            if pair.projection:
                # Seeded by name, so that another pair does not change the other projections.
                stream = np.random.default_rng([seed % 2**64, *pair.projection.encode()])
                matrix = stream.standard_normal((width, pair.width), np.float32)
                projections[pair.projection] = matrix * np.float32(width**-0.5)
    if projections:
        write_bytes(run / FILE, safetensors.numpy.save(projections))
    return projections


def saved_projections(run: Path) -> dict[str, np.ndarray]:
    """The projections that a run began with, by name; empty if it has none.

    ValueError if their file is damaged.
    """
    path = run / FILE
    try:
        return safetensors.numpy.load(path.read_bytes()) if path.exists() else {}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged: {error}. Start a new run.") from error


def with_projections(params: dict[str, Any], projections: dict[str, Any]) -> dict[str, Any]:
    """The student's parameters and, if there are any, the projections."""
    return {**params, PROJECTIONS: projections} if projections else params


def without_projections(params: dict[str, Any]) -> dict[str, Any]:
    """The student's own parameters."""
    return {name: value for name, value in params.items() if name != PROJECTIONS}
