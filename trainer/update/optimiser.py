"""AdamW, Adafactor and Muon; the learning rate over a run; the parameters with weight decay.

One array stacks a parameter of all blocks. Each layer's matrix is still factored, clipped or
orthogonalised by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from decant.trainer.config import Optimiser
from decant.trainer.update.freezing import TrainedPart
from decant.trainer.update.parameter_names import (
    STACKED,
    Path,
    Tree,
    matches,
    names,
    require_matches,
)

_MUON_RMS = 0.2
"""Root mean square of a Muon update. AdamW's is about the same, so that both can use the same
learning rate (Liu et al. 2025, "Muon is Scalable for LLM Training")."""

_IN_LAST_BUT_ONE = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
_INTO_HEADS = MuonDimensionNumbers(reduction_axis=-3, output_axis=(-2, -1))
_INTO_GROUPS = MuonDimensionNumbers(reduction_axis=-4, output_axis=(-3, -2, -1))
_MATRICES = {
    "query": _INTO_HEADS,
    "key": _INTO_HEADS,
    "value": _INTO_HEADS,
    "output": MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=-1),
    "router": _IN_LAST_BUT_ONE,
    "gate": _IN_LAST_BUT_ONE,
    "up": _IN_LAST_BUT_ONE,
    "down": _IN_LAST_BUT_ONE,
    "shared_gate": _IN_LAST_BUT_ONE,
    "shared_up": _IN_LAST_BUT_ONE,
    "shared_down": _IN_LAST_BUT_ONE,
    "output_gate": _INTO_HEADS,
    "linear_query": _INTO_HEADS,
    "linear_key": _INTO_HEADS,
    "linear_value": _INTO_GROUPS,
    "linear_gate": _INTO_GROUPS,
    "linear_output": MuonDimensionNumbers(reduction_axis=(-4, -3, -2), output_axis=-1),
}
"""Input and output axes of a block's matrices, counted from the last. Axes before them are layers
and experts."""


def make_optimiser(config: Optimiser) -> optax.GradientTransformation:
    """Transforms gradients into directions; the caller multiplies them by −learning rate.

    Frozen parameters have no moments, and their direction is zero.
    """

    def init(params: Tree) -> Any:
        trained = TrainedPart(params, freeze=config.freeze)
        return _chain(config, decay=has_weight_decay(params, config)).init(trained.select(params))

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        trained = TrainedPart(params, freeze=config.freeze)
        chain = _chain(config, decay=has_weight_decay(params, config))
        moves, state = chain.update(trained.select(updates), state, trained.select(params))
        return trained.with_zeros(moves, like=params), state

    return optax.GradientTransformation(init, update)


def learning_rate(config: Optimiser, *, steps: int) -> optax.Schedule:
    """Linear from 0 over the warm-up, then by `config.schedule` to `final_fraction` of the peak."""
    peak, warmup = config.learning_rate, config.warmup_steps
    last, end = max(steps, warmup + 1), config.learning_rate * config.final_fraction
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, last, end)
    falling = {"linear": last - warmup, "constant": 0, "wsd": _falling_steps(config, steps=steps)}
    rises = optax.linear_schedule(0.0, peak, warmup)
    stays = optax.constant_schedule(peak)
    if not (falls := falling[config.schedule]):
        return optax.join_schedules([rises, stays], [warmup])
    begins = last - falls
    return optax.join_schedules(
        [rises, stays, optax.linear_schedule(peak, end, falls)], [warmup, begins]
    )


def _falling_steps(config: Optimiser, *, steps: int) -> int:
    """Updates at the end of `wsd` in which the rate falls; none of the warm-up's."""
    return max(1, min(round(steps * config.decay_fraction), steps - config.warmup_steps))


def has_weight_decay(params: Tree, config: Optimiser) -> dict[Path, bool]:
    """Whether each array has weight decay.

    Decided by name, because stacked norms have the shape of a matrix. ValueError if `no_decay`
    names only some layers of an array, or if a pattern that is no default matches no parameter.
    """
    explicit = [p for p in config.no_decay if p not in Optimiser().no_decay]
    require_matches(params, explicit, setting="optimiser.no_decay")
    has_decay = {}
    for path, layer_names in names(params).items():
        spared = [name for name in layer_names if matches(name, config.no_decay)]
        if spared and len(spared) < len(layer_names):
            raise ValueError(
                f"optimiser.no_decay: {list(config.no_decay)} names {spared[0]} but not all of "
                f"the {len(layer_names)} layers; all layers of a parameter must have weight decay "
                "or none"
            )
        has_decay[path] = not spared
    return has_decay


def _chain(config: Optimiser, *, decay: Mapping[Path, bool]) -> optax.GradientTransformation:
    kinds = {"adamw": _adam, "adafactor": _adafactor, "muon": _muon}
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        kinds[config.name](config),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda tree: _by_path(tree, lambda path, _: decay[path])
        ),
    )


def _adam(config: Optimiser) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)


def _adafactor(config: Optimiser) -> optax.GradientTransformation:
    """Shazeer and Stern 2018: no first moment, updates relative to the size of the weights."""
    one = optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    return optax.partition({"layers": _per_layer(one), "rest": one}, _layers_or_rest)


def _muon(config: Optimiser) -> optax.GradientTransformation:
    """Muon for the blocks' matrices; Adam for all other parameters, such as embedding and head."""

    axes: Any = lambda tree: _by_path(tree, lambda path, _: _MATRICES[path[-1]])  # noqa: E731

    def sized(updates: Tree, _: Any) -> Tree:
        return _by_path(updates, lambda path, x: x * _muon_size(x, _MATRICES[path[-1]]))

    def kinds(params: Tree) -> Any:
        def kind(path: Path, _: Any) -> str:
            return "muon" if path[0] in STACKED and path[-1] in _MATRICES else "adam"

        return _by_path(params, kind)

    muon = optax.chain(
        scale_by_muon(beta=config.momentum, weight_dimension_numbers=axes), optax.stateless(sized)
    )
    return optax.partition({"muon": muon, "adam": _adam(config)}, kinds)


def _muon_size(x: jax.Array, axes: MuonDimensionNumbers) -> float:
    """√max(in, out) · 0.2, as entries of an orthogonal matrix have mean square 1/max(in, out)."""

    def length(which: Any) -> int:
        chosen = which if isinstance(which, tuple) else (which,)
        return math.prod(x.shape[axis] for axis in chosen)

    return max(length(axes.reduction_axis), length(axes.output_axis)) ** 0.5 * _MUON_RMS


def _layers_or_rest(params: Tree) -> Any:
    return _by_path(params, lambda path, _: "layers" if path[0] in STACKED else "rest")


def _per_layer(one: optax.GradientTransformation) -> optax.GradientTransformation:
    """`one` applied to each layer of each stacked array. Its state has the layer axis first."""

    def init(params: Tree) -> Any:
        return {_name(path): jax.vmap(one.init)(x) for path, x in _leaves(params)}

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        new = {}
        moved = {}
        now = dict(_leaves(params))
        for path, gradient in _leaves(updates):
            name = _name(path)
            moved[path], new[name] = jax.vmap(one.update)(gradient, state[name], now[path])
        return _by_path(updates, lambda path, _: moved[path]), new

    return optax.GradientTransformation(init, update)


def _by_path(tree: Tree, function: Callable[[Path, Any], Any]) -> Any:
    """`function(path, array)` of each array. Nodes that optax masked out are kept."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: function(tuple(key.key for key in path), x), tree
    )


def _leaves(tree: Any) -> list[tuple[Path, Any]]:
    with_paths = jax.tree_util.tree_leaves_with_path(tree)
    return [(tuple(key.key for key in path), x) for path, x in with_paths]


def _name(path: Path) -> str:
    return ".".join(path)
