"""The teacher's tail from sketches: its shape at any T, position by position.

`schemas/targets/sketch.py` says what a sketch is. A chunk's logits ẑ come from one product with the
stacked heads of all bases, [n, B·r]·[B·r, V]. The target at β = 1/T is the stored head, and on the
tail the stored mass t times s = softmax of β·ẑ over the tail, with the heads' offsets at β. No
gradient goes through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from decant.models.mesh.vocabulary import Vocabulary
from decant.models.numerics import contract, soft_cap
from decant.schemas.targets.sketch import OFFSET_BETAS, SketchHead, stacked_offsets
from decant.trainer.loss.divergences import TeacherCategories, teacher_categories
from decant.trainer.loss.student_view import StudentView, set_columns
from decant.trainer.loss.tail_corrections import TailCorrection
from decant.trainer.loss.targets import BatchTargets


@dataclass(frozen=True)
class SketchTables:
    """What turns sketches of B bases into logits. A pytree, so it can be an argument of `jit`."""

    head: Any
    """float32 [B·r, vocab]: the bases' heads below each other, each with zeros up to r rows."""
    bias: Any
    """float32 [B, vocab]."""
    softcap: float | None = None
    """Cap of the teacher's logits."""
    offsets: Any = None
    """float32 [betas, B, vocab], the biases' at `OFFSET_BETAS`; None: there are none, or `bias`
    has them."""

    def at(self, temperature: Float[Array, ""] | float) -> SketchTables:
        """The tables at T ≥ 1, whose `bias` has the offsets."""
        if self.offsets is None:
            return self
        known, beta = (0.0, *OFFSET_BETAS), 1 / jnp.float32(temperature)
        ones = np.eye(len(known), dtype=np.float32)[1:]
        weights = jnp.stack([jnp.interp(beta, jnp.asarray(known), one) for one in ones])
        offset = jnp.einsum("o,obv->bv", weights, jnp.asarray(self.offsets))
        return SketchTables(self.head, self.bias + offset, self.softcap)


jax.tree_util.register_dataclass(
    SketchTables, data_fields=["head", "bias", "offsets"], meta_fields=["softcap"]
)


def sketch_tables(heads: Sequence[SketchHead]) -> SketchTables:
    """The tables, numpy, for batches whose `sketch_basis` counts `heads`.

    ValueError if the teachers' soft caps differ: a batch has one.
    """
    if len(caps := {head.softcap for head in heads}) > 1:
        raise ValueError(
            f"sketches of teachers whose logits are capped at {sorted(map(str, caps))} cannot be "
            "mixed in one batch. Train from one of the caches, or use another loss.tail"
        )
    rank = max(len(head.head) for head in heads)
    padded = [np.pad(head.head, [(0, rank - len(head.head)), (0, 0)]) for head in heads]
    return SketchTables(
        np.concatenate(padded).astype(np.float32),
        np.stack([head.bias for head in heads]).astype(np.float32),
        heads[0].softcap,
        stacked_offsets(heads),
    )


def sketch_logits(
    targets: BatchTargets, tables: SketchTables, *, vocabulary: Vocabulary
) -> Float[Array, "n here"]:
    """ẑ of each position in this device's columns, up to a constant; −inf in padding columns.

    `tables` are those at T. ValueError if `targets` has no sketch.
    """
    sketch, basis, bases = targets.sketch, targets.sketch_basis, len(tables.bias)
    if sketch is None or basis is None:
        raise ValueError('tail = "sketch" needs sketches: targets.sketch is None')
    if short := len(tables.head) // bases - sketch.shape[-1]:
        sketch = jnp.pad(sketch, [(0, 0), (0, short)])
    own = jax.nn.one_hot(basis, bases, dtype=sketch.dtype)
    spread = (own[:, :, None] * sketch[:, None]).reshape(len(sketch), -1)
    # The bias is part of the product: added after it, it would take a second array of this size.
    numbers = jnp.concatenate([spread, own], axis=-1)
    logits = contract("nr,rv->nv", numbers, jnp.concatenate([tables.head, tables.bias]))
    return vocabulary.mask_padding(soft_cap(logits, tables.softcap))


def log_shape(
    logits: Float[Array, "n here"],
    view: StudentView,
    *,
    beta: Float[Array, ""] | float,
    vocabulary: Vocabulary,
) -> tuple[Float[Array, "n here"], Float[Array, " n"]]:
    """log s of this device's columns, and Σ s·(log s − β·student's logit) over the tail.

    In stored columns log s is arbitrary, even larger than 0. Both are 0 for an empty tail.
    """
    highest, mass, cross = _tail_sums(logits, view.tail, beta=beta)
    all_highest = vocabulary.max_over_devices(highest)
    there = jnp.isfinite(all_highest)
    top = jnp.where(there, all_highest, 0.0)
    # This device's sums are relative to its own maximum; x − −inf at a device without a tail.
    above = jnp.where(jnp.isfinite(highest), highest - top, 0.0)
    mass = mass * jnp.exp(beta * above)
    cross = cross * jnp.exp(beta * above) + mass * above
    mass, cross = vocabulary.sum_both_over_devices(mass, cross)
    mass = jnp.where(there, mass, 1.0)
    normaliser = jnp.log(mass)
    return beta * (logits - top[:, None]) - normaliser[:, None], beta * cross / mass - normaliser


def _tail_sums(
    logits: Float[Array, "n here"], tail: Float[Array, "n here"], *, beta: Float[Array, ""] | float
) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, " n"]]:
    """Local: x, the maximum of ẑ over the tail (−inf: empty); Σ e^{β(ẑ−x)}, and this sum of
    ẑ − x − the student's logit."""

    def of_some(arrays: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        own, students = arrays
        in_tail = ~jnp.isneginf(students)
        highest = jnp.max(jnp.where(in_tail, own, -jnp.inf), axis=-1, keepdims=True)
        below = own - jnp.where(jnp.isfinite(highest), highest, 0.0)
        weights = jnp.where(in_tail, jnp.exp(beta * below), 0.0)
        apart = jnp.where(in_tail, below - students, 0.0)
        return highest[:, 0], jnp.sum(weights, axis=-1), jnp.sum(weights * apart, axis=-1)

    # A few positions at a time: on CPUs XLA writes what it reduces to memory, [n, here] each time.
    pieces = next(count for count in (16, 8, 4, 2, 1) if len(logits) % count == 0)
    cut = [x.reshape(pieces, len(x) // pieces, x.shape[1]) for x in (logits, tail)]
    sums = jax.lax.map(of_some, tuple(cut))
    highest, mass, cross = (x.reshape(-1) for x in sums)
    return highest, mass, cross


def correction_from_sketch(
    view: StudentView, teacher: TeacherCategories, cross: Float[Array, " n"]
) -> TailCorrection:
    """The correction from s, `cross` being the second result of `log_shape`: ρ = t·s."""
    has_tail = jnp.isfinite(teacher.tail_logmass) & jnp.isfinite(view.tail_soft)
    t = jnp.where(has_tail, jnp.exp(teacher.logp[:, -1]), 0.0)
    return TailCorrection(
        value=t * (cross + jnp.where(has_tail, view.tail_soft, 0.0)), mass=t, density=t
    )


def with_shaped_tail(
    view: StudentView, teacher: TeacherCategories, shape: Float[Array, "n here"]
) -> Float[Array, "n here"]:
    """log p of every token of this device: the stored head, and `shape` scaled to the tail's mass.

    For divergences other than forward KL.
    """
    in_tail = jnp.where(jnp.isneginf(view.tail), -jnp.inf, teacher.logp[:, -1:] + shape)
    return set_columns(in_tail, view.columns, teacher.logp[:, :-1])


def tail_logprobs(
    targets: BatchTargets,
    tables: SketchTables,
    *,
    temperature: Float[Array, ""] | float = 1.0,
    vocabulary: int | None = None,
) -> Float[Array, "n vocab"]:
    """Log-probabilities of all ids at T, the tail's included, for n positions with a sketch.

    For losses of one's own: [n, vocab] exists at once, so call it with a few positions. All −inf at
    a position without a target. `schemas.targets.sketch.tail_logprobs` is the same in numpy.
    """
    whole = Vocabulary(vocabulary or tables.bias.shape[-1])
    logits = sketch_logits(targets, tables.at(temperature), vocabulary=whole)
    beta, kept = 1 / jnp.float32(temperature), targets.stored
    teacher = teacher_categories(
        jnp.where(kept, targets.topk_logprobs, -jnp.inf),
        jnp.where(targets.taught[:, None], targets.tail_logmass, -jnp.inf),
        beta=beta,
        tail="sketch",
    )
    columns = jnp.where(kept, targets.topk_ids, whole.size + jnp.arange(kept.shape[-1]))
    tail = set_columns(beta * logits, columns, -jnp.inf)
    # NaN if no id is in the tail: then every column is set.
    in_tail = teacher.logp[:, -1:] + jax.nn.log_softmax(tail)
    return set_columns(in_tail, columns, teacher.logp[:, :-1])
