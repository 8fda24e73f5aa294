"""A mixture of experts: each token passes the few MLPs that its router chose, exactly.

Nothing is dropped, however unevenly tokens choose, and nothing of [tokens, experts, mlp] exists.
Rows are routed apart from each other, so that a row's result has nothing to do with its neighbours
and a batch split over devices stays where it is.

Why not `lax.ragged_dot`: where XLA has no kernel for it (CPUs, jax 0.10) it becomes a product of
every token with every expert, [experts, tokens, embed] in memory and experts / chosen times the
operations. Here experts are an axis of plain einsums, which every backend has and any mesh splits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def choose_experts(
    scores: Float[Array, "batch time experts"], *, count: int, normalise: bool
) -> tuple[Int[Array, "batch time chosen"], Float[Array, "batch time chosen"]]:
    """The experts with the `count` highest probabilities, and these as weights, in float32."""
    weights, ids = lax.top_k(jax.nn.softmax(scores, axis=-1), count)
    return ids, weights / jnp.sum(weights, axis=-1, keepdims=True) if normalise else weights


def mixture_of_experts(
    x: Float[Array, "batch time embed"],
    ids: Int[Array, "batch time chosen"],
    weights: Float[Array, "batch time chosen"],
    *,
    num_experts: int,
    expert: Callable[[Float[Array, "experts batch slots embed"]], Array],
) -> Float[Array, "batch time embed"]:
    """Σ over a token's chosen experts of weight · expert(x), in float32.

    `expert` applies every expert to slots of its own. Experts take their tokens in rounds of as
    many slots as an even choice would need, until the busiest has no more: a row that chooses
    evenly costs one round, one where all tokens want the same expert all of them.
    """
    batch, time, count = ids.shape
    slots = min(time, max(8, -(-time * count // num_experts)))

    # The row's choices, ordered by expert; an expert's are a run that begins at its start.
    flat = ids.reshape(batch, time * count)
    order = jnp.argsort(flat, axis=1, stable=True)
    loads = jnp.sum(flat[:, :, None] == jnp.arange(num_experts), axis=1)
    starts = jnp.cumsum(loads, axis=1) - loads
    rank = (jnp.argsort(order, axis=1) - _take(starts, flat)).reshape(ids.shape)

    def one_round(results: Array, number: Array) -> Array:
        run = starts[:, :, None] + number * slots + jnp.arange(slots)
        # Past an expert's last token a slot holds some other, which nobody reads.
        choices = _take(order, jnp.minimum(run, time * count - 1).reshape(batch, -1))
        inputs = _take(x, choices // count).reshape(batch, num_experts, slots, -1)
        # Experts first: XLA's CPU has no product in bfloat16 with another axis before theirs.
        outputs = expert(inputs.swapaxes(0, 1)).swapaxes(0, 1)
        outputs = outputs.reshape(batch, num_experts * slots, -1)
        found = _take(outputs, (ids * slots + rank % slots).reshape(batch, -1))
        mine = rank // slots == number
        return jnp.where(mine[..., None], found.reshape(*ids.shape, -1), results)

    # Training keeps the arguments of a round only, also of those that are skipped.
    one_round = jax.checkpoint(one_round, prevent_cse=False)

    def step(results: Array, number: Array) -> tuple[Array, None]:
        busy = number * slots < jnp.max(loads)
        return lax.cond(busy, one_round, lambda results, _: results, results, number), None

    # Each result waits in a place of its own and the sum comes last, in the order of the choice:
    # adding round by round would make the last bit depend on what other tokens chose.
    nothing = jnp.zeros((*ids.shape, x.shape[-1]), x.dtype)
    results, _ = lax.scan(step, nothing, jnp.arange(-(-time // slots)))
    return jnp.sum(results.astype(jnp.float32) * weights[..., None], axis=2)


def _take(rows: Array, at: Array) -> Array:
    """rows[b, at[b]] for every b."""
    return jax.vmap(lambda row, places: row[places])(rows, at)
