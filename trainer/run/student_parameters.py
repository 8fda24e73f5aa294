"""A student as a static graph and a plain nested dict of its parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from decant.models import Decoder
from decant.models.mesh.sharding import replicate
from decant.trainer.loss.projections import with_projections


def graph_and_parameters(model: Decoder) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The model's graph and its parameters."""
    graph, state = nnx.split(model, nnx.Param)
    return graph, nnx.to_pure_dict(state)


def graph_and_all_parameters(
    model: Decoder, projections: dict[str, np.ndarray], *, mesh: Mesh
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The model's graph, and one tree of its parameters and the projections trained beside it."""
    graph, params = graph_and_parameters(model)
    # Projections are small, so every device holds them whole.
    replicated = {name: replicate(x, mesh) for name, x in projections.items()}
    return graph, with_projections(params, replicated)
