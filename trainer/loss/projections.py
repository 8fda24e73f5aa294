"""Linear maps from the student's hidden states to the teacher's, trained with the student.

While training they are parameters beside the student's own, so that they are optimised, saved and
restored with it. Evaluation and export drop them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from decant.schemas.disk.atomic import write_bytes
from decant.schemas.disk.identity import digest
from decant.trainer.loss.layer_pairs import Pairs

FILE = "projections.safetensors"
_DIGEST = "digest"
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
        saved = {_DIGEST: _digest(projections)}
        write_bytes(run / FILE, safetensors.numpy.save(projections, metadata=saved))
    return projections


def saved_projections(run: Path) -> dict[str, np.ndarray]:
    """The projections that a run began with, by name; empty if it has none.

    ValueError if their file is damaged.
    """
    path = run / FILE
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="np") as file:
            names = file.keys()  # `file` itself cannot be iterated
            projections = {name: file.get_tensor(name) for name in names}
            saved = (file.metadata() or {}).get(_DIGEST)  # None in runs of 0.7 and older
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged: {error}. Start a new run.") from error
    if saved not in (None, _digest(projections)):
        raise ValueError(f"{path}: damaged: not what was saved. Bring a copy back.")
    return projections


def _digest(projections: dict[str, np.ndarray]) -> str:
    return digest({name: [x.shape, x.tobytes().hex()] for name, x in projections.items()})


def with_projections(params: dict[str, Any], projections: dict[str, Any]) -> dict[str, Any]:
    """The student's parameters and, if there are any, the projections."""
    return {**params, PROJECTIONS: projections} if projections else params


def without_projections(params: dict[str, Any]) -> dict[str, Any]:
    """The student's own parameters."""
    return {name: value for name, value in params.items() if name != PROJECTIONS}
