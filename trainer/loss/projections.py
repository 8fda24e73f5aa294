"""Linear maps from the student's hidden states to the teacher's, trained beside the student.

They are parameters like the student's own while training lasts, so that they are optimised,
saved and restored with it, and nobody else ever sees them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from decant.schemas.disk.atomic import write_bytes
from decant.trainer.loss.layer_pairs import Pairs

FILE = "projections.safetensors"
PROJECTIONS = "projections"
"""Their place among the parameters, beside the student's `blocks`."""

Parameters = dict[str, Any]
"""The student's arrays in nested dicts; projections, if there are any, under `PROJECTIONS`."""


def initial_projections(pairs: Pairs, *, width: int, run: Path, seed: int) -> dict[str, np.ndarray]:
    """The run's first projections [width, stored], by name: as saved when it began, else made.

    Entries are normal with variance 1/width, so that states keep their size.
    """
    if (run / FILE).exists():
        return saved_projections(run)
    made = {}
    for term in pairs.hidden:
        for pair in term:
            if pair.projection:
                # A stream for each, from its name: adding a pair leaves the others as they are.
                stream = np.random.default_rng([seed, *pair.projection.encode()])
                matrix = stream.standard_normal((width, pair.width), np.float32)
                made[pair.projection] = matrix * np.float32(width**-0.5)
    if made:
        write_bytes(run / FILE, safetensors.numpy.save(made))
    return made


def saved_projections(run: Path) -> dict[str, np.ndarray]:
    """The projections that a run began with; none if it has none."""
    path = run / FILE
    return safetensors.numpy.load(path.read_bytes()) if path.exists() else {}


def with_projections(params: dict[str, Any], projections: dict[str, Any]) -> dict[str, Any]:
    """All that is trained: the student's parameters and the projections."""
    return {**params, PROJECTIONS: projections} if projections else params


def without_projections(params: dict[str, Any]) -> dict[str, Any]:
    """The student's parameters."""
    return {name: value for name, value in params.items() if name != PROJECTIONS}
