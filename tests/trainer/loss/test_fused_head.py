"""The fused head against the dense formula in float64, for all tails, chunks and paddings."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decant.trainer.loss.chunk_loss import Recipe
from decant.trainer.loss.position_chunks import positions_at_once, tokens_at_once
from decant.trainer.loss.targets import BatchTargets
from tests.formulas import dense
from tests.making.heads import (
    B,
    D,
    T,
    V,
    compiled_head,
    fused,
    head_inputs,
    head_inputs_with_tail,
    prior_nodes,
    relative,
    with_random_sketch,
)

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tv")
# Every path of the head: by tail and, for the prior, whether every token is a category.
EVERY = [
    *(("bucket", kind) for kind in DIVERGENCES),
    ("sampled", "forward_kl"),
    *(("prior", kind) for kind in DIVERGENCES),
    *(("sketch", kind) for kind in DIVERGENCES),
]
ROUTES = [("bucket", "forward_kl"), ("sampled", "forward_kl"), ("prior", "forward_kl")]
ROUTES += [("prior", "jsd"), ("sketch", "forward_kl"), ("sketch", "jsd")]
COUNTED = [*ROUTES, ("counts", "forward_kl"), (None, "on_policy")]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(("tail", "kind"), EVERY)
def test_with_every_token_stored_the_loss_is_the_textbook_one(tail, kind, temperature):
    teacher, hidden, unembedding, targets, tables = head_inputs_with_tail(tail, k=V)
    value, sums, d_hidden, d_unembedding = fused(
        hidden,
        unembedding,
        targets,
        temperature=temperature,
        alpha=0.7,
        **tables,
        tail=tail,
        divergence=kind,
        mix=0.3,
        chunk_tokens=16,
    )
    expected = dense.loss(
        teacher,
        hidden,
        unembedding,
        targets.labels,
        targets.mask,
        temperature=temperature,
        alpha=0.7,
        kind=kind,
        mix=0.3,
    )
    np.testing.assert_allclose(value, expected[0], rtol=3e-6)
    np.testing.assert_allclose(sums.kl, expected[1], rtol=3e-6)
    np.testing.assert_allclose(sums.ce, expected[2], rtol=3e-6)
    assert relative(d_hidden, expected[3]) < 5e-6
    assert relative(d_unembedding, expected[4]) < 5e-6
    assert sums.count == targets.mask.sum()


@pytest.mark.parametrize(("tail", "kind"), COUNTED)
def test_masked_positions_have_exactly_no_gradient(tail, kind):
    _, hidden, unembedding, targets, tables = head_inputs_with_tail(tail)
    mask = targets.mask.copy()
    mask[0, :4] = False  # as in a row that only fills up a batch
    targets = targets._replace(mask=mask)
    settings = {"temperature": 2.0, "alpha": 0.5, **tables, "tail": tail, "divergence": kind}
    value, _, d_hidden, _ = fused(hidden, unembedding, targets, **settings)
    assert np.isfinite(value)
    assert np.all(d_hidden[~targets.mask] == 0)
    assert np.all(np.any(d_hidden[targets.mask] != 0, axis=-1))


def test_two_stored_tokens_and_a_tail_of_two_by_hand():
    """Teacher (½, ¼ | ⅛, ⅛), student uniform: ½ln2 + ¼ln1 + ¼ln(¼ / ½) = ¼ ln 2."""
    targets = BatchTargets(
        labels=np.array([[1]], np.int32),
        mask=np.array([[True]]),
        topk_ids=np.array([[[0, 1]]], np.int32),
        topk_logprobs=np.log(np.array([[[0.5, 0.25]]], np.float32)),
        # Two equal tail tokens: A(β) = ln 2 + β ln ⅛, a straight line.
        tail_logmass=(
            np.log(2) + np.array([0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1]) * np.log(1 / 8)
        )[None, None].astype(np.float32),
    )
    hidden, unembedding = np.ones((1, 1, 1), np.float32), np.zeros((1, 4), np.float32)
    value, sums, _, d_unembedding = fused(hidden, unembedding, targets)
    np.testing.assert_allclose(value, 0.25 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(sums.ce, np.log(4), rtol=1e-6)
    # q − p on the head, q·(1 − t/τ) on each tail token with t/τ = ½.
    np.testing.assert_allclose(d_unembedding[0], [-0.25, 0, 0.125, 0.125], atol=1e-7)
    assert sums.agreement == 1  # a tie for the most likely token agrees


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 8]), st.floats(0.1, 8))
def test_the_bucket_never_exceeds_the_true_divergence(seed, k, spread):
    teacher, hidden, unembedding, targets = head_inputs(seed, k=k, spread=spread)
    for kind in ("forward_kl", "jsd"):
        got, *_ = fused(hidden, unembedding, targets, temperature=2.0, divergence=kind)
        true, *_ = dense.loss(
            teacher,
            hidden,
            unembedding,
            targets.labels,
            targets.mask,
            temperature=2.0,
            alpha=1.0,
            kind=kind,
        )
        assert 0 <= got <= true * (1 + 1e-5)


def test_renormalize_ignores_the_tail():
    """The forward KL of a teacher that sums to one over K to the whole student."""
    teacher, hidden, unembedding, targets = head_inputs(k=4)
    value, _, _, d_unembedding = fused(
        hidden, unembedding, targets, temperature=2.0, tail="renormalize"
    )
    logp = dense.log_softmax(teacher / 2.0)
    kept = np.zeros_like(logp)
    np.put_along_axis(kept, dense.targets(teacher, 4)[0].astype(np.int64), 1.0, -1)
    p = kept * np.exp(logp)
    p /= p.sum(-1, keepdims=True)
    logq = dense.log_softmax(hidden.astype(np.float64) @ unembedding / 2.0)
    kl = np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - logq), 0).sum(-1)
    np.testing.assert_allclose(value, 4 * (targets.mask * kl).sum(), rtol=1e-5)
    d_logits = 4 * (np.exp(logq) - p) / 2.0 * targets.mask[..., None]
    assert relative(d_unembedding, np.einsum("btd,btv->dv", hidden, d_logits)) < 5e-6


@pytest.mark.parametrize(
    ("tail", "kind", "chunk_tokens"),
    [*(("bucket", "forward_kl", n) for n in (1, 7, 16, 1000)), *((*r, 7) for r in COUNTED[1:])],
)
def test_the_chunk_size_changes_nothing_but_rounding(tail, kind, chunk_tokens):
    _, hidden, unembedding, targets, tables = head_inputs_with_tail(tail)
    settings = {"temperature": 2.0, "alpha": 0.5, **tables, "tail": tail, "divergence": kind}
    whole = fused(hidden, unembedding, targets, chunk_tokens=48, **settings)
    other = fused(hidden, unembedding, targets, chunk_tokens=chunk_tokens, **settings)
    np.testing.assert_allclose(other[0], whole[0], rtol=1e-6)
    assert relative(other[2], whole[2]) < 1e-5
    assert relative(other[3], whole[3]) < 1e-5


@pytest.mark.parametrize(("tail", "kind"), COUNTED)
def test_padding_and_packing_change_nothing_but_rounding(tail, kind):
    """The same positions alone, padded, or side by side in one row."""
    _, hidden, unembedding, targets, tables = head_inputs_with_tail(tail)

    def reshaped(x, pad_value=0):
        x = np.asarray(x).reshape(1, B * T, *x.shape[2:])
        return np.pad(x, [(0, 0), (0, 5)] + [(0, 0)] * (x.ndim - 2), constant_values=pad_value)

    packed = jax.tree.map(reshaped, targets)
    settings = {"temperature": 2.0, "alpha": 0.5, **tables, "tail": tail, "divergence": kind}
    apart = fused(hidden, unembedding, targets, chunk_tokens=10, **settings)
    together = fused(reshaped(hidden), unembedding, packed, chunk_tokens=10, **settings)
    np.testing.assert_allclose(together[0], apart[0], rtol=1e-6)
    assert together[1].count == apart[1].count
    assert relative(together[2][0, : B * T].reshape(B, T, D), apart[2]) < 1e-5
    assert relative(together[3], apart[3]) < 1e-5


@pytest.mark.parametrize("gap", [-28.0, 16.0, 60.0])
@pytest.mark.parametrize(("tail", "kind"), [*EVERY, ("renormalize", "forward_kl")])
def test_finite_when_the_tail_is_nearly_nothing_or_nearly_everything(tail, kind, gap):
    """One stored token and 511 in the tail, whose mass is about 1e-12·511, 1 − 1e-7 or beyond."""
    teacher = np.zeros((1, 2, V))
    teacher[..., 0] = -gap
    ids, logprobs, mass = (np.asarray(x) for x in dense.targets(teacher, 1))
    if gap > 0:  # Store the unlikely token, so that the tail holds nearly everything.
        logp = dense.log_softmax(teacher)
        ids, logprobs = np.zeros_like(ids), logp[..., :1].astype(np.float32)
        betas = np.array([0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1])
        mass = (np.log(V - 1) + betas * logp[..., 1:2]).astype(np.float32)
    targets = BatchTargets(np.zeros((1, 2), np.int32), np.ones((1, 2), bool), ids, logprobs, mass)
    if tail == "sampled":  # The tail is flat: log p is its mass over 511, r is 1/511.
        drawn = np.broadcast_to(np.array([5, 5, 511], np.int32), (1, 2, 3))
        even = np.float32(np.log(V - 1))
        logprobs = np.broadcast_to(mass[..., -1:] - even, drawn.shape)
        targets = targets._replace(
            tail_ids=drawn,
            tail_logprobs=logprobs,
            tail_logweights=np.full(drawn.shape, even - np.log(np.float32(3)), np.float32),
        )
    tables = {"prior": prior_nodes(spread=30.0)} if tail == "prior" else {}
    if tail == "sketch":
        targets, tables["sketch"] = with_random_sketch(targets, V)
    for student in (-100.0, 0.0, 100.0):
        hidden = np.ones((1, 2, 1), np.float32)
        unembedding = np.full((1, V), student, np.float32)
        unembedding[0, 0] = 0
        for temperature in (1.0, 2.0, 4.0):
            value, sums, d_hidden, d_unembedding = fused(
                hidden,
                unembedding,
                targets,
                temperature=temperature,
                **tables,
                tail=tail,
                divergence=kind,
            )
            assert np.isfinite(value)
            assert np.isfinite(sums.kl)
            assert np.all(np.isfinite(d_hidden))
            assert np.all(np.isfinite(d_unembedding))


def test_a_position_may_store_fewer_tokens_than_its_neighbours():
    """Column padding (id 0, −inf) must not hide token 0 from the tail."""
    _, hidden, unembedding, targets = head_inputs(k=4)
    wide = targets._replace(
        topk_ids=np.pad(targets.topk_ids, [(0, 0), (0, 0), (0, 3)]),
        topk_logprobs=np.pad(
            targets.topk_logprobs, [(0, 0), (0, 0), (0, 3)], constant_values=-np.inf
        ),
    )
    narrow, padded = (fused(hidden, unembedding, t, temperature=2.0) for t in (targets, wide))
    np.testing.assert_allclose(padded[0], narrow[0], rtol=1e-6)
    assert relative(padded[3], narrow[3]) < 1e-6


@pytest.mark.parametrize(("tail", "kind"), COUNTED)
def test_under_a_bfloat16_model_the_sums_stay_float32(tail, kind):
    _, hidden, unembedding, targets, tables = head_inputs_with_tail(tail)
    settings = {**tables, "tail": tail, "divergence": kind}
    half = hidden.astype(jnp.bfloat16)
    rounded = np.asarray(unembedding.astype(jnp.bfloat16), np.float32)
    exact = fused(half.astype(np.float32), rounded, targets, **settings)
    value, sums, d_hidden, d_unembedding = fused(half, unembedding, targets, **settings)
    # The products of bf16 numbers are exact in float32, so only the backward pass is rounded.
    np.testing.assert_allclose(value, exact[0], rtol=1e-5)
    assert sums.kl.dtype == jnp.float32
    assert d_unembedding.dtype == np.float32
    assert relative(d_unembedding, exact[3]) < 2e-2
    assert relative(d_hidden.astype(np.float32), exact[2]) < 2e-2


@pytest.mark.parametrize(("tail", "kind"), COUNTED)
def test_no_array_of_all_tokens_by_vocabulary_is_compiled(tail, kind):
    vocabulary, chunk = 4099, 16
    _, hidden, unembedding, targets, tables = head_inputs_with_tail(
        tail, vocabulary=vocabulary, batch=4, length=64
    )
    recipe = Recipe(tail=tail, divergence=kind, chunk_tokens=chunk)
    every = [tables.get(name) for name in ("prior", "sketch")]
    lowered = compiled_head.lower(hidden, unembedding, targets, 2.0, 0.5, *every, recipe=recipe)
    program = lowered.compile().as_text()
    shapes = re.findall(r"\[([\d,]+)\]", program)
    others = [
        np.prod([int(n) for n in shape.split(",")]) // vocabulary
        for shape in shapes
        if str(vocabulary) in shape.split(",")
    ]
    # The other axis is a chunk or the unembedding's width D, 16 both; never all 256 tokens.
    assert max(others) == chunk
    # A chunk's logits exist once, unless every token is a category.
    copies = re.findall(rf"\[{chunk},{vocabulary}\]\S* copy\(", program)
    assert bool(copies) == recipe.dense


@pytest.mark.parametrize(("tail", "kind"), ROUTES)
def test_a_student_with_capped_logits_is_scored_by_the_capped_logits(tail, kind):
    teacher, hidden, unembedding, targets, tables = head_inputs_with_tail(tail, k=V)
    settings = {"temperature": 2.0, "alpha": 0.7, "softcap": 3.0}
    value, _, d_hidden, d_unembedding = fused(
        hidden, unembedding, targets, tail=tail, **tables, divergence=kind, **settings
    )
    rows = (teacher, hidden, unembedding, targets.labels, targets.mask)
    expected = dense.loss(*rows, kind=kind, **settings)
    np.testing.assert_allclose(value, expected[0], rtol=3e-6)
    assert relative(d_hidden, expected[3]) < 5e-6
    assert relative(d_unembedding, expected[4]) < 5e-6


def test_chunk_tokens_is_the_setting_or_a_default_of_the_device(monkeypatch):
    assert tokens_at_once(None, vocabulary=49_152) == 256
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert tokens_at_once(None, vocabulary=49_152) == 2730
    assert tokens_at_once(None, vocabulary=1 << 28) == 1
    assert tokens_at_once(7, vocabulary=49_152) == 7


@pytest.mark.parametrize(
    ("tokens", "rows", "length", "positions"),
    [(256, 2, 512, 128), (2730, 64, 512, 40), (8, 1, 9, 5), (4, 8, 9, 1), (999, 1, 9, 9)],
)
def test_a_row_is_cut_evenly(tokens, rows, length, positions):
    at_once = positions_at_once(tokens, rows=rows, length=length, vocabulary=100)
    assert at_once == positions
