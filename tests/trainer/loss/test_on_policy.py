"""divergence = "on_policy" against float64 formulas, and what is right on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decant.trainer.loss.on_policy import MOST, policy_terms
from decant.trainer.loss.settings import HiddenLoss, Loss
from tests.formulas import dense
from tests.making.heads import fused, head_inputs_with_tail, relative

V = 64
STEP = 1e-6


def terms(*logprobs, clip=0.2, anchor=0.0):
    """`policy_terms` in float64."""
    with jax.enable_x64(True):
        given = [jnp.asarray(x, jnp.float64) for x in logprobs]
        return [np.asarray(x) for x in policy_terms(*given, clip=clip, anchor=anchor)]


def slope(function, x):
    """∂function/∂x by central differences in float64."""
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        there, back = x.copy(), x.copy()
        there[i] += STEP
        back[i] -= STEP
        out[i] = (function(there) - function(back)) / (2 * STEP)
    return out


@pytest.mark.parametrize("anchor", [0.0, 0.3])
def test_the_weight_is_the_slope_of_the_value_in_float64(anchor):
    rng = np.random.default_rng(0)
    student, teacher, writer = rng.normal(size=(3, 200)) - 2
    value, weight, advantage, ratio, clipped = terms(student, teacher, writer, anchor=anchor)

    def each(logq):
        ratio = np.exp(logq - writer)
        within = np.clip(ratio, 0.8, 1.2)
        policy = -np.minimum(ratio * advantage, within * advantage)
        return policy + anchor * (np.exp(writer - logq) - 1 - (writer - logq))

    expected = (each(student - STEP) - each(student + STEP)) / (2 * STEP)
    np.testing.assert_allclose(value, each(student), rtol=1e-12)
    np.testing.assert_allclose(weight, expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(ratio, np.exp(student - writer))
    np.testing.assert_allclose(advantage, teacher - student)
    # All four cases occur: clipped from above and below, and outside but not clipped.
    better, above, below = advantage > 0, ratio > 1.2, ratio < 0.8
    for case in (better & above, ~better & below):
        assert case.any()
        assert clipped[case].all()
    for case in (better & below, ~better & above, ~above & ~below):
        assert case.any()
        assert not clipped[case].any()


@pytest.mark.parametrize(("alpha", "anchor"), [(1.0, 0.0), (0.7, 0.3)])
def test_the_heads_gradient_is_that_of_the_float64_formula(alpha, anchor):
    _, hidden, unembedding, targets, _ = head_inputs_with_tail(None, vocabulary=V, length=12)
    targets.label_logprobs[targets.mask.nonzero()[0][0], targets.mask.nonzero()[1][0]] = -np.inf
    clip = 0.15
    value, sums, d_hidden, d_unembedding = fused(
        hidden,
        unembedding,
        targets,
        alpha=alpha,
        divergence="on_policy",
        tail=None,
        clip=clip,
        anchor=anchor,
    )
    rows = (targets.labels, targets.mask, targets.label_logprobs, targets.writer_logprobs)
    given = {"clip": clip, "anchor": anchor, "alpha": alpha}
    logits = hidden.astype(np.float64) @ unembedding

    expected, d_logits = dense.on_policy_loss(logits, *rows, **given)
    some = np.s_[:1, :6]  # the formula's own gradient, by differences

    def total(x):
        return dense.on_policy_loss(x, *(y[some] for y in rows), **given, at=logits[some])[0]

    np.testing.assert_allclose(d_logits[some], slope(total, logits[some]), atol=1e-7)
    np.testing.assert_allclose(value, expected, rtol=3e-6)
    assert relative(d_hidden, d_logits @ unembedding.T.astype(np.float64)) < 5e-6
    assert relative(d_unembedding, np.einsum("btd,btv->dv", hidden, d_logits)) < 5e-6
    known = np.isfinite(targets.writer_logprobs) & np.isfinite(targets.label_logprobs)
    assert sums.taught == known.sum()
    logq = np.take_along_axis(dense.log_softmax(logits), targets.labels[..., None], -1)[..., 0]
    *_, advantage, ratio, clipped = terms(
        logq[known], targets.label_logprobs[known], targets.writer_logprobs[known], clip=clip
    )
    assert 0 < clipped.mean() < 1
    for name, expected in {"advantage": advantage, "ratio": ratio, "clipped": clipped}.items():
        np.testing.assert_allclose(getattr(sums, name), expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.ce, -(targets.mask * logq).sum(), rtol=3e-6)


def test_a_token_that_nobody_wrote_is_learned_from_its_label_alone():
    teacher, hidden, unembedding, targets, _ = head_inputs_with_tail(None, vocabulary=V)
    plain = targets._replace(writer_logprobs=np.full_like(targets.writer_logprobs, np.nan))
    value, sums, *gradients = fused(
        hidden, unembedding, plain, alpha=1.0, divergence="on_policy", tail=None
    )
    rows = (hidden, unembedding, targets.labels, targets.mask)
    expected = dense.loss(teacher, *rows, temperature=1.0, alpha=0.0)
    assert sums.taught == 0
    np.testing.assert_allclose(value, expected[2], rtol=3e-6)
    for ours, theirs in zip(gradients, expected[3:], strict=True):
        assert relative(ours, theirs) < 5e-6


def test_over_all_tokens_that_the_student_may_write_it_is_the_gradient_of_reverse_kl():
    """Σ_y q(y)·gradient(y) = ∇KL(q ‖ p), and the mean advantage is −KL(q ‖ p)."""
    rng = np.random.default_rng(1)
    logits, teacher = rng.normal(size=(2, V)) * 2
    logq, logp = dense.log_softmax(logits), dense.log_softmax(teacher)
    q, p = np.exp(logq), np.exp(logp)
    _, weight, advantage, _, clipped = terms(logq, logp, logq)
    mean = (q * weight) @ (q - np.eye(V))

    def kl(x):
        return dense.divergence(p, np.exp(dense.log_softmax(x)), "reverse_kl")

    expected = slope(kl, logits)
    np.testing.assert_allclose(mean, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(q @ advantage, -kl(logits), rtol=1e-12)
    assert not clipped.any()


def test_the_anchor_is_on_average_the_kl_to_the_writer():
    rng = np.random.default_rng(2)
    logq, logw = (dense.log_softmax(x) for x in rng.normal(size=(2, V)))
    nothing = terms(logq, logq, logw)[0]
    value = terms(logq, logq, logw, anchor=1.0)[0] - nothing
    assert (value >= 0).all()
    kl = dense.divergence(np.exp(logq), np.exp(logw), "forward_kl")
    np.testing.assert_allclose(np.exp(logq) @ value, kl, rtol=1e-12)


def test_finite_however_far_the_student_is_from_the_writer():
    student = np.array([0.0, -300.0, -1e-7, -0.5], np.float32)
    writer = np.array([-300.0, 0.0, -1e-7, -1000.0], np.float32)
    for x in policy_terms(*map(jnp.asarray, (student, writer, writer)), clip=0.2, anchor=1.0):
        assert np.isfinite(x).all()
    assert np.exp(MOST) * 1e3 < np.finfo(np.float32).max


def test_alpha_is_one_unless_given():
    assert Loss().first_alpha == 0.9
    assert Loss(divergence="on_policy").first_alpha == 1.0
    assert Loss(divergence="on_policy", alpha=0.5).schedules["alpha"].ends == (0.5, 0.5)
    assert Loss(divergence="on_policy", hidden=(HiddenLoss(),)).terms


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"temperature": 2.0}, "loss.temperature is up to 2 with divergence = on_policy"),
        ({"temperature_end": 2.0}, "loss.temperature is up to 2"),
        ({"tail": "sketch"}, "reads no tail"),
        ({"tail": "counts"}, "reads no tail"),
    ],
)
def test_settings_that_it_cannot_have_are_refused_by_name(given, told):
    with pytest.raises(ValueError, match=told):
        Loss(divergence="on_policy", **given)
