"""Corrections from tail draws and from the prior, against float64 formulas and on average."""

import jax.numpy as jnp
import numpy as np
import pytest

from decant.trainer.loss.tail_corrections import log_prior_at
from tests.formulas import dense
from tests.making.heads import (
    B,
    T,
    V,
    fused,
    head_inputs,
    head_inputs_with_tail,
    prior_nodes,
    relative,
    with_draws,
)

# At T = 3, between the nodes, the interpolated tail mass is within 2e-6 KL.
OFF_NODE = 1e-4


def same(got, expected, *, value=3e-6, gradient=5e-6):
    np.testing.assert_allclose(got[0], expected[0], rtol=value)
    np.testing.assert_allclose(got[1].kl, expected[1], rtol=value)
    np.testing.assert_allclose(got[1].ce, expected[2], rtol=value)
    assert relative(got[2], expected[3]) < gradient
    assert relative(got[3], expected[4]) < gradient


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_correction_from_draws_is_its_formula(temperature):
    teacher, hidden, unembedding, targets = head_inputs(k=8, spread=2.0)
    targets = with_draws(targets, teacher, betas=(1.0, 0.5))
    # One position has no draws and one has a draw less; missing draws are id 0 and −inf.
    for name, absent in (("ids", 0), ("logprobs", -np.inf), ("logweights", -np.inf)):
        array = getattr(targets, f"tail_{name}")
        array[0, 0], array[1, 1, -1] = absent, absent
    ids = np.sort(targets.tail_ids, -1)
    assert np.any((ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] > 0))  # some tokens repeat
    got = fused(
        hidden,
        unembedding,
        targets,
        temperature=temperature,
        alpha=0.7,
        tail="sampled",
        chunk_tokens=16,
    )
    expected = dense.sampled_loss(
        teacher,
        hidden,
        unembedding,
        targets.labels,
        targets.mask,
        temperature=temperature,
        alpha=0.7,
        ids=targets.topk_ids,
        draws=(targets.tail_ids, targets.tail_logprobs, targets.tail_logweights),
    )
    same(got, expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_is_right_on_average_where_the_bucket_is_not(temperature):
    """64 fixed directions of the gradient and the value, over 256 redraws."""
    redraws, settings = 256, {"temperature": temperature, "chunk_tokens": 48}
    teacher, hidden, unembedding, targets = head_inputs(k=8, spread=1.5)
    rng = np.random.default_rng(5)
    directions = rng.normal(size=(64, hidden.size + unembedding.size))

    def seen(value, d_hidden, d_unembedding):
        gradient = np.concatenate([np.ravel(d_hidden), np.ravel(d_unembedding)])
        return np.append(directions @ gradient.astype(np.float64), value)

    value, *_, d_hidden, d_unembedding = dense.loss(
        teacher,
        hidden,
        unembedding,
        targets.labels,
        targets.mask,
        temperature=temperature,
        alpha=1.0,
        kind="forward_kl",
    )
    truth = seen(value, d_hidden, d_unembedding)
    samples = []
    for seed in range(redraws):
        drawn = with_draws(targets, teacher, m=16, seed=seed, betas=(1.0, 0.5))
        value, _, *gradients = fused(hidden, unembedding, drawn, tail="sampled", **settings)
        samples.append(seen(value, *gradients))
    error = np.std(samples, axis=0, ddof=1) / np.sqrt(redraws)
    assert np.max(np.abs(np.mean(samples, axis=0) - truth) / error) <= 4
    value, _, *gradients = fused(hidden, unembedding, targets, **settings)
    assert np.max(np.abs(seen(value, *gradients) - truth) / error) > 20


@pytest.mark.parametrize("k", [1, 8, V - 1])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tv"])
def test_a_prior_is_the_dense_loss_of_its_target(kind, k):
    """With V − 1 stored tokens, the one in the tail has all of its mass, whatever the prior."""
    teacher, hidden, unembedding, targets, tables = head_inputs_with_tail("prior", k=k)
    prior = tables["prior"]
    for temperature in (1.0, 2.0, 3.0, 4.0):
        p = dense.with_prior(teacher, targets.topk_ids, prior, temperature=temperature)
        got = fused(
            hidden,
            unembedding,
            targets,
            temperature=temperature,
            alpha=0.7,
            prior=prior,
            tail="prior",
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
            p=p,
        )
        off_node = {"value": 2e-5, "gradient": OFF_NODE}
        same(got, expected, **off_node if temperature == 3 else {"value": 5e-6, "gradient": 1e-5})


def test_a_prior_that_the_stored_tokens_nearly_exhaust_is_still_exact():
    """Π is 1e-9 at one position, where a difference of sums would be rounding error."""
    teacher, hidden, unembedding, targets, tables = head_inputs_with_tail("prior", k=8, spread=2.0)
    prior = tables["prior"]
    flat = np.zeros_like(prior)
    flat[:, targets.topk_ids[0, 3]] = 27.0
    flat += prior_nodes(1, spread=0.5)
    p = dense.with_prior(teacher, targets.topk_ids, flat, temperature=1.0)
    got = fused(hidden, unembedding, targets, prior=flat, tail="prior")
    expected = dense.loss(
        teacher,
        hidden,
        unembedding,
        targets.labels,
        targets.mask,
        temperature=1.0,
        alpha=1.0,
        kind="forward_kl",
        p=p,
    )
    same(got, expected, gradient=1e-5)


def test_a_prior_below_the_clamp_is_uniform_and_not_ignored():
    """All tokens but one have e^−95 of its prior; they are equal if that one is stored."""
    teacher, hidden, unembedding, targets = head_inputs(k=8, spread=2.0)
    prior = np.zeros((7, V), np.float32)
    prior[:, targets.topk_ids[0, 3, 0]] = 95.0
    p = dense.with_prior(teacher, targets.topk_ids, prior, temperature=1.0)
    got = fused(hidden, unembedding, targets, prior=prior, tail="prior")
    expected = dense.loss(
        teacher,
        hidden,
        unembedding,
        targets.labels,
        targets.mask,
        temperature=1.0,
        alpha=1.0,
        kind="forward_kl",
        p=p,
    )
    same(got, expected, value=1e-5, gradient=1e-5)


def test_the_true_tail_as_prior_makes_the_loss_the_textbook_one():
    """All positions have the same teacher distribution, so that one prior fits all."""
    teacher, hidden, unembedding, targets = head_inputs(k=1)
    teacher = np.broadcast_to(teacher[:1, :1], teacher.shape)
    ids, logprobs, mass = dense.targets(teacher, 8)
    targets = targets._replace(
        mask=np.ones((B, T), bool), topk_ids=ids, topk_logprobs=logprobs, tail_logmass=mass
    )
    nodes = (dense.BETAS[:, None] * dense.log_softmax(teacher[0, 0]) - 7.0).astype(np.float32)
    for temperature in (1.0, 2.0):
        got = fused(
            hidden, unembedding, targets, temperature=temperature, prior=nodes, tail="prior"
        )
        expected = dense.loss(
            teacher,
            hidden,
            unembedding,
            targets.labels,
            targets.mask,
            temperature=temperature,
            alpha=1.0,
            kind="forward_kl",
        )
        same(got, expected, value=1e-5, gradient=1e-5)


def test_the_log_prior_is_linear_between_nodes_and_equal_to_them_at_nodes():
    nodes = prior_nodes(2).astype(np.float64)
    expected = ((1.0, {6: 1}), (0.5, {3: 1}), (1 / 16, {0: 0.5, 1: 0.5}), (0.8, {4: 0.6, 5: 0.4}))
    for beta, shares in expected:
        line = sum(share * nodes[i] for i, share in shares.items())
        np.testing.assert_allclose(
            log_prior_at(jnp.float32(nodes), beta=beta), dense.log_softmax(line), atol=2e-5
        )
