"""A mixture of experts: each token passes through the few MLPs that its router chose.

The result is exact: no token is dropped, however unevenly tokens choose. No array of shape
[tokens, experts, mlp] exists. Each row is routed by itself, so a row's result does not depend on
its neighbours, and routing moves nothing between devices that hold different rows.

Why not `lax.ragged_dot`: where XLA has no kernel for it (CPUs, jax 0.10), it multiplies every token
with every expert. That takes [experts, tokens, embed] in memory and experts / chosen times the
operations. Here experts are an axis of plain einsums, which every backend has and any mesh splits.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int


def choose_experts(
    scores: Float[Array, "batch time experts"],
    correction: Float[Array, " experts"] | None = None,
    *,
    count: int,
    normalise: bool,
    router: Literal["softmax", "sigmoid"] = "softmax",
    groups: int = 1,
    groups_per_token: int = 1,
    group_votes: int = 2,
    multiplier: float = 1.0,
) -> tuple[Int[Array, "batch time chosen"], Float[Array, "batch time chosen"]]:
    """Numbers of the `count` experts of largest weight, and their weights in float32.

    Args:
        scores: the router's output.
        correction: added to the weights for the choice only.
        count: experts per token.
        normalise: divide the chosen experts' weights by their sum.
        router: makes weights of scores.
        groups: of experts, equal and in order.
        groups_per_token: experts are chosen in this many groups.
        group_votes: a group counts as much as this many of its largest weights.
        multiplier: of the weights, after `normalise`.
    """
    all_weights = jax.nn.softmax(scores, axis=-1) if router == "softmax" else nnx.sigmoid(scores)
    by = all_weights if correction is None else all_weights + correction.astype(jnp.float32)
    if groups_per_token < groups:
        grouped = by.reshape(*by.shape[:-1], groups, -1)
        counts = jnp.sum(lax.top_k(grouped, group_votes)[0], axis=-1)
        _, chosen = lax.top_k(counts, groups_per_token)
        open_to = jnp.any(chosen[..., None] == jnp.arange(groups), axis=-2)
        by = jnp.where(open_to[..., None], grouped, -jnp.inf).reshape(by.shape)
    weights, ids = lax.top_k(by, count)
    if by is not all_weights:
        weights = jnp.take_along_axis(all_weights, ids, axis=-1)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return ids, weights if multiplier == 1 else weights * multiplier


def mixture_of_experts(
    x: Float[Array, "batch time embed"],
    ids: Int[Array, "batch time chosen"],
    weights: Float[Array, "batch time chosen"],
    *,
    num_experts: int,
    expert: Callable[[Float[Array, "experts batch slots embed"]], Array],
) -> Float[Array, "batch time embed"]:
    """Σ over a token's chosen experts of weight · expert(x), in float32.

    Experts process their tokens in rounds. A round has as many slots per expert as an even choice
    would need, and rounds go on until the busiest expert is done. A row that chooses evenly costs
    one round; a row whose tokens all choose the same expert costs all rounds.

    Args:
        x: the MLP's input.
        ids: the chosen experts of each token.
        weights: of the chosen experts.
        num_experts: of the block.
        expert: applies each expert to its own slots; its output has the shape of its input.
    """
    batch, time, count = ids.shape
    slots = min(time, max(8, -(-time * count // num_experts)))

    # Sort the row's choices by expert. Each expert's choices form a run from its `starts` entry.
    flat = ids.reshape(batch, time * count)
    order = jnp.argsort(flat, axis=1, stable=True)
    loads = jnp.sum(flat[:, :, None] == jnp.arange(num_experts), axis=1)
    starts = jnp.cumsum(loads, axis=1) - loads
    rank = (jnp.argsort(order, axis=1) - _take(starts, flat)).reshape(ids.shape)

    def one_round(results: Array, number: Array) -> Array:
        run = starts[:, :, None] + number * slots + jnp.arange(slots)
        # Slots past an expert's last token hold another token, whose output is never read.
        choices = _take(order, jnp.minimum(run, time * count - 1).reshape(batch, -1))
        inputs = _take(x, choices // count).reshape(batch, num_experts, slots, -1)
        # Experts first: XLA on CPUs has no bfloat16 product with another axis before theirs.
        outputs = expert(inputs.swapaxes(0, 1)).swapaxes(0, 1)
        outputs = outputs.reshape(batch, num_experts * slots, -1)
        chosen = _take(outputs, (ids * slots + rank % slots).reshape(batch, -1))
        in_round = rank // slots == number
        return jnp.where(in_round[..., None], chosen.reshape(*ids.shape, -1), results)

    # Training keeps only the arguments of each round, skipped rounds included.
    one_round = jax.checkpoint(one_round, prevent_cse=False)

    def step(results: Array, number: Array) -> tuple[Array, None]:
        busy = number * slots < jnp.max(loads)
        return lax.cond(busy, one_round, lambda results, _: results, results, number), None

    # Results are summed at the end, in the order of the choices. Adding them round by round would
    # make the last bit depend on the choices of other tokens.
    empty = jnp.zeros((*ids.shape, x.shape[-1]), x.dtype)
    results, _ = lax.scan(step, empty, jnp.arange(-(-time // slots)))
    return jnp.sum(results.astype(jnp.float32) * weights[..., None], axis=2)


def _take(rows: Array, at: Array) -> Array:
    """rows[b, at[b]] for every b."""
    return jax.vmap(lambda row, places: row[places])(rows, at)
