"""The fused head against the dense formula in float64, and what must not matter to it."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer import dense
from trainer.chunk import Recipe
from trainer.head import distillation_loss
from trainer.view import Targets

V, D, B, T = 512, 16, 2, 24


def make(seed=0, *, k=V, spread=3.0, vocabulary=V, batch=B, length=T):
    rng = np.random.default_rng(seed)
    teacher = rng.normal(size=(batch, length, vocabulary)) * spread
    hidden = rng.normal(size=(batch, length, D)).astype(np.float32)
    unembedding = (rng.normal(size=(D, vocabulary)) * 0.5).astype(np.float32)
    labels = rng.integers(0, vocabulary, (batch, length)).astype(np.int32)
    mask = rng.random((batch, length)) < 0.8
    ids, logprobs, mass = dense.targets(teacher, k)
    # As Cache.read pads: id 0, log-prob −inf, tail −inf where nothing is scored.
    ids, logprobs = np.where(mask[..., None], ids, 0), np.where(mask[..., None], logprobs, -np.inf)
    targets = Targets(labels, mask, ids, logprobs, np.where(mask[..., None], mass, -np.inf))
    return teacher, hidden, unembedding, targets


# Without LLVM's optimiser: compiling is most of what these tests do.
@partial(
    jax.jit,
    static_argnames="recipe",
    compiler_options={"xla_backend_optimization_level": 0},
)
def step(hidden, unembedding, targets, temperature, alpha, *, recipe):
    def loss(hidden, unembedding):
        return distillation_loss(
            hidden, unembedding, targets, temperature=temperature, alpha=alpha, recipe=recipe
        )

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, unembedding)


def fused(hidden, unembedding, targets, *, temperature=1.0, alpha=1.0, **recipe):
    """Loss, Sums, ∂/∂hidden, ∂/∂unembedding as the trainer gets them."""
    (value, sums), (d_hidden, d_unembedding) = step(
        hidden, unembedding, targets, temperature, alpha, recipe=Recipe(**recipe)
    )
    return float(value), sums, np.asarray(d_hidden), np.asarray(d_unembedding)


def relative(a, b):
    return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tv"])
def test_with_every_token_stored_the_loss_is_the_textbook_one(kind, temperature):
    teacher, hidden, unembedding, targets = make()
    value, sums, d_hidden, d_unembedding = fused(
        hidden,
        unembedding,
        targets,
        temperature=temperature,
        alpha=0.7,
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


def test_masked_positions_have_exactly_no_gradient():
    _, hidden, unembedding, targets = make(k=8)
    *_, d_hidden, _ = fused(hidden, unembedding, targets, temperature=2.0, alpha=0.5)
    assert np.all(d_hidden[~targets.mask] == 0)
    assert np.all(np.any(d_hidden[targets.mask] != 0, axis=-1))


def test_two_stored_tokens_and_a_tail_of_two_by_hand():
    """Teacher (½, ¼ | ⅛, ⅛), student uniform: ½ln2 + ¼ln1 + ¼ln(¼ / ½) = ¼ ln 2."""
    targets = Targets(
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
    teacher, hidden, unembedding, targets = make(seed, k=k, spread=spread)
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
    """Teacher over K sums to one; forward KL of it against the whole student."""
    teacher, hidden, unembedding, targets = make(k=4)
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


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 1000])
def test_the_chunk_size_changes_nothing_but_rounding(chunk_tokens):
    _, hidden, unembedding, targets = make(k=8)
    whole = fused(hidden, unembedding, targets, temperature=2.0, alpha=0.5, chunk_tokens=48)
    other = fused(
        hidden, unembedding, targets, temperature=2.0, alpha=0.5, chunk_tokens=chunk_tokens
    )
    np.testing.assert_allclose(other[0], whole[0], rtol=1e-6)
    assert relative(other[2], whole[2]) < 1e-5
    assert relative(other[3], whole[3]) < 1e-5


def test_padding_and_packing_change_nothing_but_rounding():
    """The same positions alone, padded, or side by side in one row."""
    _, hidden, unembedding, targets = make(k=8)

    def reshaped(x, pad_value=0):
        x = np.asarray(x).reshape(1, B * T, *x.shape[2:])
        return np.pad(x, [(0, 0), (0, 5)] + [(0, 0)] * (x.ndim - 2), constant_values=pad_value)

    packed = jax.tree.map(reshaped, targets)
    apart = fused(hidden, unembedding, targets, temperature=2.0, alpha=0.5, chunk_tokens=10)
    together = fused(
        reshaped(hidden), unembedding, packed, temperature=2.0, alpha=0.5, chunk_tokens=10
    )
    np.testing.assert_allclose(together[0], apart[0], rtol=1e-6)
    assert together[1].count == apart[1].count
    assert relative(together[2][0, : B * T].reshape(B, T, D), apart[2]) < 1e-5
    assert relative(together[3], apart[3]) < 1e-5


@pytest.mark.parametrize("gap", [-28.0, 16.0, 60.0])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tv"])
def test_finite_when_the_tail_is_nearly_nothing_or_nearly_everything(kind, gap):
    """One stored token against 511: tail mass about 1e-12·511 and 1 − 1e-7, and further."""
    teacher = np.zeros((1, 2, V))
    teacher[..., 0] = -gap
    ids, logprobs, mass = (np.asarray(x) for x in dense.targets(teacher, 1))
    if gap > 0:  # Store the unlikely token, so that the tail holds nearly everything.
        logp = dense.log_softmax(teacher)
        ids, logprobs = np.zeros_like(ids), logp[..., :1].astype(np.float32)
        betas = np.array([0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1])
        mass = (np.log(V - 1) + betas * logp[..., 1:2]).astype(np.float32)
    targets = Targets(np.zeros((1, 2), np.int32), np.ones((1, 2), bool), ids, logprobs, mass)
    for student in (-100.0, 0.0, 100.0):
        hidden = np.ones((1, 2, 1), np.float32)
        unembedding = np.full((1, V), student, np.float32)
        unembedding[0, 0] = 0
        for temperature in (1.0, 2.0, 4.0):
            value, sums, d_hidden, d_unembedding = fused(
                hidden, unembedding, targets, temperature=temperature, divergence=kind
            )
            assert np.isfinite(value)
            assert np.isfinite(sums.kl)
            assert np.all(np.isfinite(d_hidden))
            assert np.all(np.isfinite(d_unembedding))


def test_a_position_may_store_fewer_tokens_than_its_neighbours():
    """Column padding (id 0, −inf) must not hide token 0 from the tail."""
    _, hidden, unembedding, targets = make(k=4)
    wide = targets._replace(
        topk_ids=np.pad(targets.topk_ids, [(0, 0), (0, 0), (0, 3)]),
        topk_logprobs=np.pad(
            targets.topk_logprobs, [(0, 0), (0, 0), (0, 3)], constant_values=-np.inf
        ),
    )
    narrow, padded = (fused(hidden, unembedding, t, temperature=2.0) for t in (targets, wide))
    np.testing.assert_allclose(padded[0], narrow[0], rtol=1e-6)
    assert relative(padded[3], narrow[3]) < 1e-6


def test_under_a_bfloat16_model_the_sums_stay_float32():
    _, hidden, unembedding, targets = make(k=8)
    half = hidden.astype(jnp.bfloat16)
    exact = fused(
        half.astype(np.float32), np.asarray(unembedding.astype(jnp.bfloat16), np.float32), targets
    )
    value, sums, d_hidden, d_unembedding = fused(half, unembedding, targets)
    # The products of bf16 numbers are exact in float32, so only the backward pass is rounded.
    np.testing.assert_allclose(value, exact[0], rtol=1e-5)
    assert sums.kl.dtype == jnp.float32
    assert d_unembedding.dtype == np.float32
    assert relative(d_unembedding, exact[3]) < 2e-2
    assert relative(d_hidden.astype(np.float32), exact[2]) < 2e-2


def test_no_array_of_all_tokens_by_vocabulary_is_compiled():
    vocabulary, length, chunk = 4099, 64, 16
    _, hidden, unembedding, targets = make(k=8, vocabulary=vocabulary, batch=4, length=length)

    lowered = step.lower(hidden, unembedding, targets, 2.0, 0.5, recipe=Recipe(chunk_tokens=chunk))
    shapes = re.findall(r"\[([\d,]+)\]", lowered.compile().as_text())
    others = [
        np.prod([int(n) for n in shape.split(",")]) // vocabulary
        for shape in shapes
        if str(vocabulary) in shape.split(",")
    ]
    assert max(others) == chunk  # also the unembedding's D = 16; nothing near the 256 tokens
