"""Linear attention by the gated delta rule: each position decays and corrects a matrix per head.

With key k, value v, decay 0 < a ≤ 1 and rate 0 < β < 1 of a position, the matrix S [key, value] of
the positions before it becomes

    S ← a·S + k (β · (v − (a·S)ᵀ k))ᵀ,

so that it gives more nearly v for k, and the position's output is Sᵀ q. S begins at zero with each
segment. Chunks of positions are computed with matrix products as in arXiv 2412.06464, in float32.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from decant.models.numerics import contract

CHUNK = 64
"""Positions that are computed together; a power of two."""
_NO_SEGMENT = -1


class LinearState(NamedTuple):
    """What one block keeps of the positions so far, all of them of one segment."""

    queries: Array
    """The inputs of the convolution at the last positions, [batch, taps − 1, …]; as keys, values.
    Zero where the segment is shorter."""
    keys: Array
    values: Array
    matrix: Float[Array, "batch groups shared key value"]


def convolve(
    x: Float[Array, "batch time *channels"],
    taps: Float[Array, "taps ..."],
    segment_ids: Int[Array, "batch time"],
    past: Float[Array, "batch before *channels"] | None = None,
) -> tuple[Float[Array, "batch time *channels"], Float[Array, "batch before *channels"]]:
    """silu of each channel's weighted sum over the last positions of the segment; and the new past.

    Args:
        x: float32.
        taps: the weight of the position itself comes last.
        segment_ids: sums do not cross segments.
        past: inputs before x, of the segment that x begins with. None: x begins all segments.
    """
    before, time = taps.shape[0] - 1, x.shape[1]
    first, last = segment_ids[:, :1], segment_ids[:, -1:]
    if past is None:
        past = jnp.zeros((x.shape[0], before, *x.shape[2:]), x.dtype)
        first = jnp.full_like(first, _NO_SEGMENT)
    every = jnp.concatenate([past, x], axis=1)
    segments = jnp.concatenate([jnp.repeat(first, before, axis=1), segment_ids], axis=1)

    def within(x: Array, seen: Array) -> Array:
        return jnp.where(seen.reshape(*seen.shape, *[1] * (x.ndim - 2)), x, 0)

    total = x * taps[before].astype(jnp.float32)
    for start in range(before):
        here = slice(start, start + time)
        shifted = within(every[:, here], segments[:, here] == segment_ids)
        total = total + shifted * taps[start].astype(jnp.float32)
    kept = within(every[:, time:], segments[:, time:] == last)
    return jax.nn.silu(total), kept


def gated_delta_rule(
    queries: Float[Array, "batch time groups key"],
    keys: Float[Array, "batch time groups key"],
    values: Float[Array, "batch time groups shared value"],
    log_decays: Float[Array, "batch time groups shared"],
    rates: Float[Array, "batch time groups shared"],
    segment_ids: Int[Array, "batch time"],
    matrix: Float[Array, "batch groups shared key value"] | None = None,
) -> tuple[
    Float[Array, "batch time groups shared value"],
    Float[Array, "batch groups shared key value"],
]:
    """Outputs, and the matrix after the last position; all float32.

    Args:
        queries: of unit length over √key.
        keys: of unit length.
        values: each group's share a query and a key.
        log_decays: log a ≤ 0.
        rates: β.
        segment_ids: the matrix is zero where a segment begins.
        matrix: of the positions before these, of the segment that these begin with. None: there
            are none.
    """
    # Training keeps the arguments only: what a chunk makes of them is larger.
    rule = jax.checkpoint(_in_chunks, prevent_cse=False)
    return rule(queries, keys, values, log_decays, rates, segment_ids, matrix)


def _in_chunks(
    queries: Array,
    keys: Array,
    values: Array,
    log_decays: Array,
    rates: Array,
    segment_ids: Array,
    matrix: Array | None,
) -> tuple[Array, Array]:
    batch, time = segment_ids.shape
    size = min(CHUNK, 1 << (time - 1).bit_length())
    before = segment_ids[:, :1] if matrix is not None else jnp.full((batch, 1), _NO_SEGMENT)
    if matrix is None:
        shape = (batch, *values.shape[2:4], keys.shape[-1], values.shape[-1])
        matrix = jnp.zeros(shape, jnp.float32)

    def chunks(x: Array, mode: str = "constant") -> Array:
        """[batch, chunks, size, …]; positions are added that change nothing: β = log a = 0."""
        padding = [(0, 0), (0, -time % size), *[(0, 0)] * (x.ndim - 2)]
        return jnp.pad(x, padding, mode=mode).reshape(batch, -1, size, *x.shape[2:])

    q, k, v, b = map(chunks, (queries, keys, values, rates))
    segments = chunks(segment_ids, mode="edge")
    ends = jnp.cumsum(chunks(log_decays), axis=2)  # log of the decay since the chunk's beginning
    goes_on = jnp.concatenate([before, segments[:, :-1, -1]], axis=1)
    from_before = (segments == goes_on[..., None])[..., None, None]
    to_end = (segments == segments[..., -1:])[..., None, None]

    # [batch, chunk, groups, shared, i, j]: the decay from position j to i.
    earlier = jnp.tril(segments[..., :, None] == segments[..., None, :])
    of_heads = jnp.moveaxis(ends, 2, -1)
    log_between = of_heads[..., :, None] - of_heads[..., None, :]
    # Masked before the exponential: above the diagonal it may be infinite, and so its gradient.
    between = jnp.exp(jnp.where(earlier[:, :, None, None], log_between, -jnp.inf))

    # What each position writes is its value less what the chunk's earlier ones wrote for its key:
    # (1 + strict) written = β · (v − decay · Sᵀ k), of which S is known only in the scan.
    like = contract("bnigk,bnjgk->bngij", k, k)[:, :, :, None]
    strict = jnp.tril(jnp.moveaxis(b, 2, -1)[..., None] * like * between, -1)
    solve = partial(contract, "bngrij,bnjgrx->bngrix", _inverse(strict))
    decayed = jnp.where(from_before, jnp.exp(ends), 0)
    new = solve(b[..., None] * v)
    taken = solve((b * decayed)[..., None] * k[:, :, :, :, None])

    attended = contract("bnigk,bnjgk->bngij", q, k)[:, :, :, None] * between
    asking = jnp.moveaxis(decayed[..., None] * q[:, :, :, :, None], 2, -2)
    left = jnp.where(to_end, jnp.exp(ends[:, :, -1:] - ends), 0)
    writing = jnp.moveaxis(left[..., None] * k[:, :, :, :, None], 2, -2)
    kept = decayed[:, :, -1]

    def step(matrix: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        new, taken, attended, asking, writing, kept = chunk
        written = new - contract("bgrik,bgrkv->bgriv", taken, matrix)
        out = contract("bgrik,bgrkv->bgriv", asking, matrix)
        out = out + contract("bgrij,bgrjv->bgriv", attended, written)
        added = contract("bgrik,bgriv->bgrkv", writing, written)
        return kept[..., None, None] * matrix + added, out

    of_chunks = (new, taken, attended, asking, writing, kept)
    matrix, out = lax.scan(step, matrix, jax.tree.map(lambda x: x.swapaxes(0, 1), of_chunks))
    # [chunk, batch, groups, shared, i, value] → [batch, time, groups, shared, value]
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, *values.shape[2:])
    return out[:, :time], matrix


def _inverse(strict: Float[Array, "*axes size size"]) -> Float[Array, "*axes size size"]:
    """The inverse of 1 + `strict`, which is strictly lower triangular; size is a power of two.

    Inverses of blocks on the diagonal make those of blocks of twice the size. Powers of `strict`
    would be products as well, but overflow where keys repeat.
    """
    *axes, size, _ = strict.shape
    inverse = jnp.ones((*axes, size, 1, 1), strict.dtype)
    for half in (1 << i for i in range(size.bit_length() - 1)):
        blocks = strict.reshape(*axes, size // half, half, size // half, half)
        # Block (2n + 1, 2n), which lies under the diagonal.
        below = jnp.moveaxis(jnp.diagonal(blocks[..., 1::2, :, ::2, :], 0, -4, -2), -1, -3)
        upper, lower = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        product = partial(contract, "...ij,...jk->...ik")
        corner = -product(product(lower, below), upper)
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, lower], axis=-1)], axis=-2)
    return inverse[..., 0, :, :]


def unit_length(x: Float[Array, "*axes width"]) -> Float[Array, "*axes width"]:
    """x / √(Σ x² + 1e-6)."""
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def gated_norm(
    x: Float[Array, "*axes width"],
    gate: Float[Array, "*axes width"],
    weight: Float[Array, " width"],
    *,
    eps: float,
) -> Float[Array, "*axes width"]:
    """x / √(mean x² + eps) · weight · silu(gate), in float32."""
    x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * weight.astype(jnp.float32) * jax.nn.silu(gate)
