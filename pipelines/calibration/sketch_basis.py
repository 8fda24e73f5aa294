"""The basis of sketches (defined in `schemas.targets.sketch`), found on the calibration sample.

A small change δ of the state h changes the logits by δ·W, which matters to softmax by its variance
over the ids, δᵀGδ with G = Cov_{v∼P}(W_v) and P the teacher's mean softmax at T = 2. So states are
compared in this metric: with G = L·Lᵀ, the basis U are the leading eigenvectors of Lᵀ·Cov(h)·L.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from decant.models.mesh.sharding import DATA, TENSOR
from decant.models.numerics import soft_cap_slope
from decant.pipelines.calibration.sketch_offsets import MOST_POSITIONS, find_offsets
from decant.pipelines.teacher.loaded import DeviceBatch
from decant.pipelines.teacher.sharded_head import Head
from decant.pipelines.teacher.targets import CHUNK_TOKENS
from decant.schemas.targets.sketch import SketchBasis, SketchHead

_TEMPERATURE = 2.0
_FLOOR = 1e-6
"""Eigenvalues below this share of the largest are rounding, and their directions left out."""
_FULL_FLOOR = 1e-3
"""With rank "full" no direction may be left out. Smaller eigenvalues count as this share of the
largest, so that the projection's condition number is at most 32 and float32 is exact enough."""
_COLUMNS = 8192
"""Columns of the unembedding that are weighted and multiplied at once."""
_exact = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@dataclass(frozen=True)
class StateMoments:
    """The last states of a sample, and G, in float64."""

    positions: int
    mean: Float[np.ndarray, " width"]
    covariance: Float[np.ndarray, "width width"]
    metric: Float[np.ndarray, "width width"]
    """G."""


class SketchSums:
    """Observes a run: sums states and their products, and softmax at T = 2, of counted positions.

    One batch is summed on the devices in float32, batches on the host in float64.
    """

    layers = ()

    def __init__(self) -> None:
        self._totals: list[np.ndarray] = []
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []
        self._kept_positions = 0
        self._unembedding: Array
        self._head: Head

    def observe(self, batch: DeviceBatch) -> None:
        """Add the batch's sums; blocks until the device is done. Ignores rows with NaN."""
        self._unembedding, self._head = batch.unembedding, batch.head
        hidden, counted = _finite_rows(batch.hidden, batch.inputs["loss_mask"])
        softmax = _softmax_sums(hidden, batch.unembedding, counted, head=batch.head)
        new = [np.asarray(x, np.float64) for x in (*_state_sums(hidden, counted), *softmax)]
        if all(np.isfinite(x).all() for x in new):
            old = self._totals or [np.zeros_like(x) for x in new]
            self._totals = [a + b for a, b in zip(old, new, strict=True)]
            if self._kept_positions < MOST_POSITIONS:
                self._kept.append((np.asarray(hidden), np.asarray(counted)))
                self._kept_positions += int(new[0])

    def with_offsets(self, basis: SketchBasis, *, k: int, step: float, dither: bool) -> SketchBasis:
        """The basis with offsets, for sketches rounded to multiples of `step` (with or without
        dither) beside a head of `k` ids; A is rounded as it is stored."""
        stored = basis.head.head.astype(np.float16).astype(np.float32)
        basis = dataclasses.replace(basis, head=dataclasses.replace(basis.head, head=stored))
        offsets = find_offsets(
            self._kept,
            self._unembedding,
            basis,
            k=k,
            step=step,
            dither=dither,
            head=self._head,
        )
        return dataclasses.replace(basis, head=dataclasses.replace(basis.head, offsets=offsets))

    def moments(self) -> StateMoments:
        """The moments of all batches. ValueError if no position was counted."""
        if not self._totals or not self._totals[0]:
            raise ValueError("the calibration sample has no position to find a sketch's basis on")
        count, sums, products, shares, slopes = self._totals
        mean = sums / count
        share = shares / count
        # The slope that each id's cap has where the id is likely.
        slope = np.divide(slopes, shares, out=np.ones_like(shares), where=shares > 0)
        metric = _metric(
            self._unembedding,
            *(self._on_columns(x) for x in (share, slope)),
            head=self._head,
        )
        return StateMoments(
            int(count),
            mean,
            products / count - np.outer(mean, mean),
            np.asarray(metric, np.float64),
        )

    def head_of(
        self, matrix: Float[np.ndarray, "width r"], mean: Float[np.ndarray, " width"]
    ) -> tuple[Float[np.ndarray, "r vocabulary"], Float[np.ndarray, " vocabulary"]]:
        """matrixᵀ·W and mean·W, float32; each device multiplies its own columns."""
        arrays = (jnp.asarray(x, jnp.float32) for x in (matrix, mean))
        head, bias = _products(self._unembedding, *arrays, head=self._head)
        size = self._head.vocabulary.size
        return np.asarray(head)[:, :size], np.asarray(bias)[:size]

    @property
    def softcap(self) -> float | None:
        """Cap of the teacher's logits."""
        return self._head.softcap

    def _on_columns(self, of_ids: np.ndarray) -> Array:
        """A number per id on the devices that have its column; 0 for padding columns."""
        assert self._head.mesh
        padded = np.pad(of_ids, (0, self._unembedding.shape[1] - len(of_ids))).astype(np.float32)
        return jax.device_put(padded, NamedSharding(self._head.mesh, P(TENSOR)))


def find_basis(
    sums: SketchSums, moments: StateMoments, *, rank: int | None
) -> tuple[SketchBasis, float]:
    """The basis of `rank` numbers, fewer if no more matter, and the share of variance it keeps.

    None: as many as the state is wide, from which all logits come back exactly. The variance is
    that of the logits at T = 2, in the metric G.
    """
    half, inverse = _halves(moments.metric, floor=_FULL_FLOOR if rank is None else 0.0)
    variances, basis = np.linalg.eigh(half.T @ moments.covariance @ half)
    variances = np.maximum(variances[::-1], 0)
    if rank is not None:
        rank = min(rank, max(1, int((variances > _FLOOR * variances[0]).sum())))
    basis = basis[:, ::-1][:, :rank]
    projection = half @ basis
    # The library chooses an eigenvector's sign: we make the column's largest coordinate positive.
    signs = np.sign(np.take_along_axis(projection, np.abs(projection).argmax(0)[None], 0))
    back = inverse @ (basis * signs)
    mean = moments.mean.astype(np.float32)
    head, bias = sums.head_of(back, mean)
    found = SketchBasis(
        mean,
        (projection * signs).astype(np.float32),
        SketchHead(head, bias, sums.softcap),
        # Never 0: a step is a multiple of one of them. A sample of one position has no variance.
        np.sqrt(np.maximum(variances[:rank], _FLOOR * (variances[0] or 1.0))),
    )
    return found, float(variances[:rank].sum() / (variances.sum() or 1.0))


def _halves(metric: np.ndarray, *, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """L and the transpose of its pseudo-inverse, [D, d]; eigenvalues are at least `floor` times the
    largest, and directions without any are left out."""
    values, vectors = np.linalg.eigh(metric)
    if values.max() <= 0:  # the sample's softmax does not depend on the state
        values = np.ones_like(values)
    values = np.maximum(values, floor * values.max())
    kept = values > _FLOOR * values.max()
    root, vectors = np.sqrt(values[kept]), vectors[:, kept]
    return vectors * root, vectors / root


def least_lost_variance(moments: StateMoments, *, rank: int) -> float:
    """`lost_variance` of the best basis of this rank for the sample."""
    half, _ = _halves(moments.metric, floor=0.0)
    variances = np.linalg.eigvalsh(half.T @ moments.covariance @ half)
    return float(np.maximum(variances[:-rank], 0).sum())


def lost_variance(
    moments: StateMoments,
    mean: Float[np.ndarray, " width"],
    projection: Float[np.ndarray, "width r"],
) -> float:
    """Variance of the logits at T = 2 that sketches of this basis do not explain on the sample.

    The part of a state that a sketch leaves out is orthogonal, in the metric of the basis's own
    sample, to the part that it keeps; here the best linear guess from the sketch is taken.
    """
    off = moments.mean - mean
    second = moments.covariance + np.outer(off, off)
    of_sketch = projection.T @ second @ projection
    both = second @ projection
    explained = both @ np.linalg.pinv(of_sketch, rcond=1e-10, hermitian=True) @ both.T
    return float(np.sum(moments.metric * (second - explained)))


@jax.jit
def _finite_rows(hidden, counted):
    """The states, zeroed where they are not counted; no position of a row with NaN is."""
    wrong = counted & ~jnp.isfinite(hidden).all(axis=-1)
    counted = counted & ~wrong.any(axis=1, keepdims=True)
    return jnp.where(counted[..., None], hidden, 0), counted


@jax.jit
def _state_sums(hidden, counted):
    states = hidden.astype(jnp.float32)
    return counted.sum(), states.sum((0, 1)), _exact("btd,bte->de", states, states)


@partial(jax.jit, static_argnames="head")
def _softmax_sums(hidden, unembedding, counted, *, head: Head):
    """Σ softmax(z/T)_v over the counted positions, and the same weighted by the cap's slope."""

    def of_device(hidden, unembedding, counted):
        flat = hidden.reshape(-1, hidden.shape[-1])
        sums = _sums_of_chunks(flat, unembedding, counted.reshape(-1), head=head)
        return lax.psum(sums, DATA)

    out = P(TENSOR), P(TENSOR)
    sums = head.on_each_device(of_device, hidden, unembedding, counted, out=out)
    return [x[: head.vocabulary.size] for x in sums]


def _sums_of_chunks(hidden, unembedding, counted, *, head: Head):
    chunk = min(CHUNK_TOKENS, len(hidden))
    missing = -len(hidden) % chunk
    hidden = jnp.pad(hidden, ((0, missing), (0, 0))).reshape(-1, chunk, hidden.shape[1])
    counted = jnp.pad(counted, (0, missing)).reshape(-1, chunk)

    def add(totals: tuple[Array, Array], xs: tuple[Array, Array]):
        hidden_C, counted_C = xs
        logits = head.logits(hidden_C, unembedding)
        largest = head.vocabulary.max_over_devices(jnp.max(logits, axis=-1))
        weights = jnp.exp((logits - largest[:, None]) / _TEMPERATURE)
        total = head.vocabulary.sum_over_devices(jnp.sum(weights, axis=-1))
        share = jnp.where(counted_C, 1 / total, 0)
        shares = _exact("t,tv->v", share, weights)
        if head.softcap is None:
            return (totals[0] + shares, totals[1] + shares), None
        slopes = jnp.where(weights > 0, soft_cap_slope(logits, head.softcap) * weights, 0)
        return (totals[0] + shares, totals[1] + _exact("t,tv->v", share, slopes)), None

    here = unembedding.shape[1]
    totals, _ = lax.scan(add, (jnp.zeros(here), jnp.zeros(here)), (hidden, counted))
    return totals


def _on_columns(function, unembedding, *arrays, head: Head, specs, out):
    """Call `function` on each device with its columns; `specs` are those of `arrays`."""
    assert head.mesh
    return jax.shard_map(
        function,
        mesh=head.mesh,
        in_specs=(P(None, TENSOR), *specs),
        out_specs=out,
        check_vma=False,
    )(unembedding, *arrays)


@partial(jax.jit, static_argnames="head")
def _metric(unembedding, share, slope, *, head: Head):
    """G = Σ_v share_v·(slope_v·W_v − μ)(slope_v·W_v − μ)ᵀ, whole on every device."""

    def of_device(unembedding, share, slope):
        here = unembedding.shape[1]

        def block(start: int):
            at = slice(start, start + _COLUMNS)
            return unembedding[:, at].astype(jnp.float32) * slope[at], share[at]

        starts = range(0, here, _COLUMNS)
        centre = lax.psum(sum(_exact("dv,v->d", *block(start)) for start in starts), TENSOR)
        total = jnp.zeros((len(unembedding), len(unembedding)))
        for start in starts:
            columns, weight = block(start)
            columns = (columns - centre[:, None]) * jnp.sqrt(weight)
            total += _exact("dv,ev->de", columns, columns)
        return lax.psum(total, TENSOR)

    return _on_columns(
        of_device, unembedding, share, slope, head=head, specs=(P(TENSOR), P(TENSOR)), out=P()
    )


@partial(jax.jit, static_argnames="head")
def _products(unembedding, matrix, mean, *, head: Head):
    def of_device(unembedding, matrix, mean):
        columns = unembedding.astype(jnp.float32)
        return _exact("dr,dv->rv", matrix, columns), _exact("d,dv->v", mean, columns)

    return _on_columns(
        of_device,
        unembedding,
        matrix,
        mean,
        head=head,
        specs=(P(), P()),
        out=(P(None, TENSOR), P(TENSOR)),
    )
