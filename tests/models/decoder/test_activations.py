"""Sparse gates against the formula in float64, and their gradients where the formula has none."""

import jax
import jax.numpy as jnp
import numpy as np

from decant.models.decoder.activations import above_cutoff, cutoff


def test_gates_below_the_cutoff_are_zero_and_others_are_reduced_by_it():
    gate = np.random.default_rng(0).normal(1.0, 2.0, (3, 5000))
    # 95 % of a normal distribution lie below 1.6448536 standard deviations.
    least = gate.mean(-1, keepdims=True) + 1.6448536 * gate.std(-1, keepdims=True)
    ours = above_cutoff(jnp.asarray(gate, jnp.float32), jnp.float32(cutoff(0.95)))
    np.testing.assert_allclose(ours, np.maximum(gate - least, 0), atol=5e-6)
    assert 0.94 < np.mean(ours == 0) < 0.96


def test_without_sparsity_gates_and_gradients_stay_as_they_are():
    gate = jnp.linspace(-2, 2, 7)
    value, pull = jax.vjp(lambda g: above_cutoff(g, jnp.float32(cutoff(0.0))), gate)
    np.testing.assert_array_equal(value, gate)
    np.testing.assert_array_equal(pull(gate)[0], gate)


def test_equal_gates_have_finite_gradients():
    gradient = jax.grad(lambda g: above_cutoff(g, jnp.float32(cutoff(0.5))).sum())(jnp.ones(6))
    assert np.isfinite(gradient).all()
