"""The offsets of a sketch's bias (defined in `schemas.targets.sketch`), found on the sample.

They begin at 0. A pass over a sample sums, id by id, what the teacher's tails give and what the
sketches' tails give; T times the logarithm of their ratio is added to the id's offset. The first
pass is over a few batches, so that little is left to correct in the second, which is over all.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from decant.models.mesh.sharding import DATA, TENSOR, batch_sharding
from decant.models.numerics import contract, soft_cap
from decant.pipelines.teacher.sharded_head import Head
from decant.pipelines.teacher.targets import CHUNK_TOKENS, in_tail, split_off_top_k
from decant.schemas.targets.sketch import OFFSET_BETAS, SketchBasis

MOST_POSITIONS = 16 << 10
"""Positions that the sums take, about. Students at T = 2 (`benchmarks.quality`, one order of rows)
went 86.4, 89.1 and 90.8% of the way to the dense teacher with offsets from three samples of 4,096
positions; 91.3% with 16k positions, 91.7% with all 42k of their corpus."""
_FIRST = 8
"""The first pass is over every so many batches."""
_GOLDEN = 2654435769
"""2³² times the golden ratio less one."""
_FEW = 3.0
"""An id that only this many positions give its mass gets half the offset, because it is noise."""


def find_offsets(
    batches: Sequence[tuple[np.ndarray, Bool[np.ndarray, "batch time"]]],
    unembedding: Array,
    basis: SketchBasis,
    *,
    k: int,
    step: float,
    dither: bool,
    head: Head,
) -> Float[np.ndarray, "betas vocabulary"]:
    """The offsets, float32, for sketches rounded to multiples of `step` (0: not), with or without
    dither.

    `batches` are the states that the head reads [batch, time, width] and which positions count. The
    tail is what the top-`k` leaves out.
    """
    assert head.mesh
    columns = NamedSharding(head.mesh, P(None, TENSOR))
    missing = unembedding.shape[1] - head.vocabulary.size

    def on_devices(table: np.ndarray) -> Array:
        return jax.device_put(np.pad(table, ((0, 0), (0, missing))).astype(np.float32), columns)

    matrix, bias = on_devices(basis.head.head), basis.head.bias
    rounding = (step, float(dither))
    offsets = np.zeros((len(OFFSET_BETAS), head.vocabulary.size))
    for some in (batches[::_FIRST], batches):
        totals: list[np.ndarray] = []
        for states, counted in some:
            inputs = [jax.device_put(x, batch_sharding(head.mesh)) for x in (states, counted)]
            tables = (matrix, on_devices(bias + offsets), basis.mean, basis.projection, *rounding)
            new = _sums(*inputs, unembedding, tables, k=k, head=head)
            new = [np.asarray(x, np.float64)[:, : head.vocabulary.size] for x in new]
            totals = [a + b for a, b in zip(totals, new, strict=True)] if totals else new
        offsets += _correction(*totals)
    return offsets.astype(np.float32)


def _correction(own, squares, sketched) -> np.ndarray:
    """What to add to the offsets, from sums over the sample: the teacher's shares, their squares,
    and the sketches' shares; each [betas, vocabulary]."""
    there = (own > 0) & (sketched > 0)
    ratio = np.divide(own, sketched, out=np.ones_like(own), where=there)
    positions = np.divide(own * own, squares, out=np.zeros_like(own), where=squares > 0)
    trust = positions / (positions + _FEW)
    return trust * np.log(ratio) / np.array(OFFSET_BETAS)[:, None]


@partial(jax.jit, static_argnames=("k", "head"))
def _sums(states, counted, unembedding, tables, *, k: int, head: Head):
    """The three sums of `_correction` over one batch."""
    matrix, biases, *everywhere = tables

    def of_device(states, counted, unembedding, matrix, biases, everywhere):
        rows, length, width = states.shape
        flat, counted = states.reshape(-1, width), counted.reshape(-1)
        places = jnp.tile(jnp.arange(length, dtype=jnp.uint32), rows)
        own = (matrix, biases, *everywhere)
        sums = _sums_of_chunks(flat, counted, places, unembedding, own, k=k, head=head)
        return lax.psum(sums, DATA)

    in_columns = P(None, TENSOR)
    return jax.shard_map(
        of_device,
        mesh=head.mesh,
        in_specs=(P(DATA), P(DATA), in_columns, in_columns, in_columns, P()),
        out_specs=(in_columns,) * 3,
        check_vma=False,  # it cannot infer that gathered arrays are replicated
    )(states, counted, unembedding, matrix, biases, everywhere)


def _sums_of_chunks(states, counted, places, unembedding, tables, *, k: int, head: Head):
    chunk = min(CHUNK_TOKENS, len(states))
    missing = -len(states) % chunk
    states = jnp.pad(states, ((0, missing), (0, 0))).reshape(-1, chunk, states.shape[1])
    counted, places = (jnp.pad(x, (0, missing)).reshape(-1, chunk) for x in (counted, places))

    def add(totals, xs):
        states_C, counted_C, places_C = xs
        new = _sums_of_chunk(states_C, counted_C, places_C, unembedding, tables, k=k, head=head)
        return jax.tree.map(jnp.add, totals, new), None

    nothing = (jnp.zeros((len(OFFSET_BETAS), unembedding.shape[1])),) * 3
    return lax.scan(add, nothing, (states, counted, places))[0]


def _sums_of_chunk(states, counted, places, unembedding, tables, *, k: int, head: Head):
    matrix, biases, mean, projection, step, dither = tables
    vocabulary, betas = head.vocabulary, (0.0, *OFFSET_BETAS)
    logits = head.logits(states, unembedding)
    split = split_off_top_k(logits, k=k, vocabulary=vocabulary, betas=betas)
    tail = vocabulary.exclude_padding(in_tail(split, vocabulary=vocabulary)) & counted[:, None]
    logprobs, top = (x - split.normaliser[:, None] for x in (split.logits, split.top))
    sketch = contract("nd,dr->nr", states.astype(jnp.float32) - mean, projection)
    added = dither * _even_fractions(places)[:, None]
    rounded = (jnp.round(sketch / jnp.where(step > 0, step, 1) + added) - added) * step
    explained = contract("nr,rv->nv", jnp.where(step > 0, rounded, sketch), matrix)

    one = jnp.ones(len(states))  # XLA's sum over rows takes ten times as long as this product

    def at(beta: Array, tail_logmass: Array, bias: Array) -> tuple[Array, Array, Array]:
        whole = jnp.logaddexp(jnp.log(jnp.sum(jnp.exp(beta * top), axis=-1)), tail_logmass)
        p = jnp.where(tail, jnp.exp(beta * logprobs - whole[:, None]), 0.0)
        shape = jnp.where(tail, beta * soft_cap(explained + bias, head.softcap), -jnp.inf)
        highest = vocabulary.max_over_devices(jnp.max(shape, axis=-1))
        there = jnp.isfinite(highest)
        weights = jnp.exp(shape - jnp.where(there, highest, 0.0)[:, None])
        total = vocabulary.sum_over_devices(jnp.sum(weights, axis=-1))
        share = jnp.where(there, jnp.exp(tail_logmass - whole) / total, 0.0)
        q = jnp.where(tail, weights * share[:, None], 0.0)
        sum_p, sum_squares, sum_q = (contract("n,nv->v", one, x) for x in (p, p * p, q))
        return sum_p, sum_squares, sum_q

    nodes = jnp.asarray(OFFSET_BETAS), split.tail_logmass[:, 1:].T, biases
    return lax.map(lambda xs: at(*xs), nodes)


def _even_fractions(places: Array) -> Array:
    """A dither in [−½, ½) for these places of their rows, [n].

    It is spread evenly. It depends on the place alone, so that offsets do not depend on batches; a
    row's own dither depends on its key.
    """
    return (places * jnp.uint32(_GOLDEN)).astype(jnp.float32) * jnp.float32(2.0**-32) - 0.5
