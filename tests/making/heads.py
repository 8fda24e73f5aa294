"""Random inputs for tests of the fused head, and the head compiled as in training."""

from functools import partial

import jax
import numpy as np

from decant.schemas.targets.sketch import SketchHead
from decant.schemas.targets.unmatched import Partners
from decant.trainer.loss.chunk_loss import Recipe
from decant.trainer.loss.fused_head import distillation_loss
from decant.trainer.loss.sketches import sketch_tables
from decant.trainer.loss.targets import BatchTargets
from tests.formulas import by_rank, dense

V, D, B, T, M = 512, 16, 2, 24, 6
SIZE, THEIRS = 40, 56
"""Ids of the student and of the teacher in `matched_inputs`."""


def head_inputs(seed=0, *, k=V, spread=3.0, vocabulary=V, batch=B, length=T):
    """Teacher logits, hidden states, unembedding and targets, padded as by `Cache.read`.

    `spread` is the standard deviation of the teacher's logits. About 80% of positions count.
    """
    rng = np.random.default_rng(seed)
    teacher = rng.normal(size=(batch, length, vocabulary)) * spread
    hidden = rng.normal(size=(batch, length, D)).astype(np.float32)
    unembedding = (rng.normal(size=(D, vocabulary)) * 0.5).astype(np.float32)
    labels = rng.integers(0, vocabulary, (batch, length)).astype(np.int32)
    mask = rng.random((batch, length)) < 0.8
    ids, logprobs, mass = dense.targets(teacher, k)
    # An unscored position has ids 0, log-probs −inf and tail masses −inf.
    ids, logprobs = np.where(mask[..., None], ids, 0), np.where(mask[..., None], logprobs, -np.inf)
    targets = BatchTargets(labels, mask, ids, logprobs, np.where(mask[..., None], mass, -np.inf))
    return teacher, hidden, unembedding, targets


def matched_inputs(seed=0, *, k):
    """`head_inputs` of a teacher with more tokens than the student; half of the student's have a
    partner. Also the student's id of each of the teacher's tokens, or −1; and `Partners`."""
    rng = np.random.default_rng(seed)
    _, hidden, unembedding, targets = head_inputs(seed, k=4, vocabulary=SIZE, length=6)
    teacher = rng.normal(size=(2, 6, THEIRS)) * 3
    partner = np.full(THEIRS, -1)
    partner[rng.permutation(THEIRS)[: SIZE // 2]] = rng.permutation(SIZE)[: SIZE // 2]
    alone = np.ones(SIZE, np.float32)
    alone[partner[partner >= 0]] = 0
    partners = Partners(alone, np.float32((partner >= 0).mean()))
    targets = by_rank.split_targets(targets, teacher, k=k, partner=partner)
    return teacher, hidden, unembedding, targets, partner, partners


def with_draws(targets, teacher, *, m=M, seed=0, betas=(1.0,)):
    """`targets` with up to m tail draws at each position."""
    drawn = dense.draws(teacher, targets.topk_ids, m=m, betas=betas, seed=seed)
    there = targets.mask[..., None] & np.isfinite(drawn[1])
    ids, logprobs, logweights = drawn
    return targets._replace(
        tail_ids=np.where(there, ids, 0).astype(np.int32),
        tail_logprobs=np.where(there, logprobs, -np.inf).astype(np.float32),
        tail_logweights=np.where(there, logweights, -np.inf).astype(np.float32),
    )


def prior_nodes(seed=0, *, vocabulary=V, spread=3.0):
    """log π at the 7 nodes: not normalised, flatter towards β = 0, not linear in β."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=vocabulary) * spread
    nodes = dense.BETAS[:, None] * scores + rng.normal(size=(7, vocabulary)) * 0.3 - 2.0
    return nodes.astype(np.float32)


# Without LLVM's optimiser, because compiling takes most of the time of these tests.
@partial(
    jax.jit,
    static_argnames="recipe",
    compiler_options={"xla_backend_optimization_level": 0},
)
def compiled_head(
    hidden, unembedding, targets, temperature, alpha, prior, sketch=None, partners=None, *, recipe
):
    def loss(hidden, unembedding):
        return distillation_loss(
            hidden,
            unembedding,
            targets,
            temperature=temperature,
            alpha=alpha,
            prior=prior,
            sketch=sketch,
            partners=partners,
            recipe=recipe,
        )

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, unembedding)


def fused(
    hidden,
    unembedding,
    targets,
    *,
    temperature=1.0,
    alpha=1.0,
    prior=None,
    sketch=None,
    partners=None,
    **recipe,
):
    """Loss, `HeadSums`, ∂/∂hidden and ∂/∂unembedding of the compiled head."""
    tables = (prior, sketch, partners)
    (value, sums), (d_hidden, d_unembedding) = compiled_head(
        hidden, unembedding, targets, temperature, alpha, *tables, recipe=Recipe(**recipe)
    )
    return float(value), sums, np.asarray(d_hidden), np.asarray(d_unembedding)


def head_inputs_with_tail(tail, *, seed=0, k=8, **shape):
    """`head_inputs` with the arrays that `tail` needs; its tables by name are the fifth value.

    `tail` None: those of "on_policy".
    """
    teacher, hidden, unembedding, targets = head_inputs(seed, k=k, **shape)
    tables = {}
    if tail is None:
        targets = with_writer(targets, teacher, hidden, unembedding, seed=seed)
    elif tail == "sampled":
        targets = with_draws(targets, teacher, seed=seed)
    elif tail == "prior":
        tables["prior"] = prior_nodes(vocabulary=teacher.shape[-1])
    elif tail == "counts":
        targets = with_counts(targets, teacher, seed=seed)
    elif tail == "sketch":
        targets, tables["sketch"] = with_random_sketch(targets, teacher.shape[-1])
    return teacher, hidden, unembedding, targets, tables


def with_writer(targets, teacher, hidden, unembedding, *, seed=0):
    """`targets` of tokens of which three in four were written, by a model near the student.

    Their k is 0, as for "on_policy" in training.
    """
    rng = np.random.default_rng(seed + 1)
    labels = targets.labels[..., None]
    student = dense.log_softmax(hidden.astype(np.float64) @ unembedding)
    theirs, own = (
        np.take_along_axis(logp, labels, -1)[..., 0].astype(np.float32)
        for logp in (dense.log_softmax(teacher), student)
    )
    writer = own + rng.normal(size=own.shape).astype(np.float32) * 0.3
    written = targets.mask & (rng.random(own.shape) < 0.75)
    return targets._replace(
        topk_ids=targets.topk_ids[..., :0],
        topk_logprobs=targets.topk_logprobs[..., :0],
        tail_logmass=targets.tail_logmass[..., :0],
        label_logprobs=np.where(targets.mask, theirs, -np.inf).astype(np.float32),
        writer_logprobs=np.where(written, writer, np.nan).astype(np.float32),
    )


def with_random_sketch(targets, vocabulary, *, bases=2, rank=3, seed=0):
    """`targets` with sketches that have nothing to do with the teacher, and their tables."""
    rng = np.random.default_rng(seed)
    heads = [
        SketchHead(*(rng.normal(size=s).astype(np.float32) for s in shape))
        for shape in [((rank, vocabulary), vocabulary)] * bases
    ]
    rows, length = targets.mask.shape
    sketch = rng.normal(size=(rows, length, rank)).astype(np.float32)
    basis = np.broadcast_to(np.arange(rows)[:, None] % bases, (rows, length)).astype(np.int32)
    own = np.where(targets.mask[..., None], sketch, 0)
    return targets._replace(sketch=own, sketch_basis=basis), sketch_tables(heads)


def with_counts(targets, teacher, *, N=20, seed=0):
    """`targets` with N systematic draws of the whole distribution, counted."""
    ids, counts = dense.counts(teacher, N=N, seed=seed)
    there = targets.mask[..., None]
    return targets._replace(count_ids=np.where(there, ids, 0), counts=np.where(there, counts, 0))


def with_sketch(targets, teacher, *, bases=1, softcap=None, seed=0):
    """`targets` with sketches that give the teacher's logits exactly, and their tables.

    The vocabulary is small enough to be the rank: head = a rotation, and the bias is taken off.
    Each basis has a rotation and a bias of its own; rows take turns.
    """
    rng = np.random.default_rng(seed)
    size = teacher.shape[-1]
    uncapped = teacher if softcap is None else softcap * np.arctanh(teacher / softcap)
    heads, sketches = [], []
    for _ in range(bases):
        matrix = np.linalg.qr(rng.normal(size=(size, size)))[0]
        bias = rng.normal(size=size)
        sketches.append((uncapped - bias) @ matrix.T)
        heads.append(SketchHead(matrix.astype(np.float32), bias.astype(np.float32), softcap))
    basis = np.broadcast_to(np.arange(len(teacher))[:, None] % bases, teacher.shape[:2])
    own = np.choose(basis[..., None], sketches).astype(np.float32)
    there = targets.mask[..., None]
    return targets._replace(
        sketch=np.where(there, own, 0), sketch_basis=basis.astype(np.int32)
    ), sketch_tables(heads)


def sketched_logits(targets, tables):
    """ẑ of each position in float64."""
    bases = len(tables.bias)
    heads = np.asarray(tables.head, np.float64).reshape(bases, -1, tables.head.shape[-1])
    each = np.einsum("btr,xrv->xbtv", np.asarray(targets.sketch, np.float64), heads)
    each += np.asarray(tables.bias)[:, None, None]
    own = np.eye(bases)[targets.sketch_basis]
    return np.einsum("xbtv,btx->btv", each, own)


def relative(a, b):
    return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
