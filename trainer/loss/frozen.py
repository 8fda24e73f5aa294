"""A student's parameters apart: an adapter's, which are trained, and all others, which are not.

Frozen arrays are inputs of an update and no part of its state. So they have no gradient, no moments
and no place in checkpoints.
"""

from __future__ import annotations

from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from decant.models.checkpoints.adapters import is_adapters
from decant.trainer.loss.projections import PROJECTIONS, Parameters


def trained_and_frozen(params: Parameters) -> tuple[Parameters, Parameters]:
    """The adapter and the projections, and all other arrays; without an adapter none is frozen."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    if not any(is_adapters(path[-1]) for path in flat):
        return params, {}
    trained = {p: x for p, x in flat.items() if is_adapters(p[-1]) or p[0] == PROJECTIONS}
    frozen = {p: x for p, x in flat.items() if p not in trained}
    return unflatten_dict(trained), unflatten_dict(frozen)


def joined(trained: Parameters, frozen: Parameters) -> Parameters:
    """The parameters that `trained_and_frozen` took apart."""
    if not frozen:
        return trained
    return unflatten_dict({**flatten_dict(frozen), **flatten_dict(trained)})
