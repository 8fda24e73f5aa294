"""Distances of hidden states against formulas in float64, and for zero or uncounted states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decant.trainer.loss.hidden_states import hidden_loss
from tests.formulas.slopes import slope

B, T, D, W = 2, 5, 4, 3


def textbook(student, teacher, counted, kind, matrix=None):
    """Σ over counted positions, in a loop, in float64."""
    total = 0.0
    for b, t in zip(*np.nonzero(counted), strict=True):
        x, y = np.float64(student[b, t]), np.float64(teacher[b, t])
        if matrix is not None:
            x = x @ np.float64(matrix)
        if kind == "mse":
            total += ((x - y) ** 2).sum() / len(y)
        else:
            total += 1 - (x @ y) / np.sqrt((x @ x) * (y @ y))
    return total


def states(seed=0, *, stored=D, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    student = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    teacher = jnp.asarray(rng.normal(size=(B, T, stored)) * 2, jnp.bfloat16)
    return student, teacher, rng.random((B, T)) < 0.6


def value_and_slope(student, teacher, counted, kind, matrix=None):
    def loss(student, matrix):
        return hidden_loss(student, teacher, jnp.asarray(counted), kind=kind, matrix=matrix)

    return jax.value_and_grad(loss, argnums=(0, 1) if matrix is not None else 0)(student, matrix)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_value_and_gradient_are_the_formula_s_over_counted_positions(kind):
    student, teacher, counted = states()
    value, gradient = value_and_slope(student, teacher, counted, kind)
    assert 0 < counted.sum() < counted.size
    np.testing.assert_allclose(value, textbook(student, teacher, counted, kind), rtol=1e-6)
    expected = slope(lambda x: textbook(x, teacher, counted, kind), student)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert np.all(np.asarray(gradient)[~counted] == 0)


@pytest.mark.parametrize("stored", [D, W])
def test_with_scale_sum_it_is_the_classic_sum_over_the_width(stored):
    student, teacher, counted = states(stored=stored)
    matrix = None if stored == D else jnp.asarray(np.random.default_rng(1).normal(size=(D, W)))
    value = hidden_loss(
        student, teacher, jnp.asarray(counted), kind="mse", scale="sum", matrix=matrix
    )
    mapped = np.float64(student) if matrix is None else np.float64(student) @ np.float64(matrix)
    mask = counted[..., None].astype(float)
    expected = (((mapped - np.float64(teacher)) * mask) ** 2).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_a_matrix_maps_states_of_another_width_and_gets_a_gradient(kind):
    student, teacher, counted = states(stored=W)
    matrix = np.random.default_rng(1).normal(size=(D, W)).astype(np.float32)
    value, (d_student, d_matrix) = value_and_slope(student, teacher, counted, kind, matrix)
    expected = textbook(student, teacher, counted, kind, matrix)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    by_student = slope(lambda x: textbook(x, teacher, counted, kind, matrix), student)
    by_matrix = slope(lambda x: textbook(student, teacher, counted, kind, x), matrix)
    np.testing.assert_allclose(d_student, by_student, atol=1e-5)
    np.testing.assert_allclose(d_matrix, by_matrix, atol=1e-5)


def test_the_cosine_distance_of_a_zero_state_is_one_with_zero_gradient():
    student, teacher, counted = states()
    student, teacher = student.at[0, 0].set(0), teacher.at[1, 1].set(0)
    counted[:] = False
    counted[[0, 1], [0, 1]] = True
    value, gradient = value_and_slope(student, teacher, counted, "cosine")
    assert float(value) == 2.0
    assert np.all(np.asarray(gradient) == 0)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_the_cosine_distance_does_not_depend_on_sizes(size):
    student, teacher, counted = states()
    value, gradient = value_and_slope(student, teacher, counted, "cosine")
    other, sized = value_and_slope(student * size, teacher, counted, "cosine")
    np.testing.assert_allclose(other, value, rtol=1e-5)
    np.testing.assert_allclose(sized * size, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_stored_values_of_uncounted_positions_may_be_anything(kind):
    student, teacher, counted = states()
    value, gradient = value_and_slope(student, teacher, counted, kind)
    odd = jnp.where(counted[..., None], teacher, jnp.nan)
    other, same = value_and_slope(student, odd, counted, kind)
    assert float(other) == float(value)
    np.testing.assert_array_equal(same, gradient)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_half_precision_states_are_compared_and_summed_in_float32(kind):
    rng = np.random.default_rng(0)
    student = jnp.asarray(rng.normal(size=(1, 2000, 8)) + 2, jnp.bfloat16)
    teacher = jnp.asarray(rng.normal(size=(1, 2000, 8)) + 2, jnp.bfloat16)
    counted = np.ones((1, 2000), bool)
    value, gradient = value_and_slope(student, teacher, counted, kind)
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, textbook(student, teacher, counted, kind), rtol=1e-5)


def test_the_width_does_not_scale_the_distance():
    student, teacher, counted = states()
    for kind in ("mse", "cosine"):
        value, _ = value_and_slope(student, teacher, counted, kind)
        twice = (jnp.concatenate([x, x], axis=-1) for x in (student, teacher))
        other, _ = value_and_slope(*twice, counted, kind)
        np.testing.assert_allclose(other, value, rtol=1e-6)


def test_the_cosine_is_half_the_mse_of_states_of_unit_root_mean_square():
    """An option that normalises states would therefore add nothing."""
    student, teacher, counted = states()
    value, _ = value_and_slope(student, teacher, counted, "cosine")

    def unit(x):
        return x / np.sqrt((np.float64(x) ** 2).mean(-1, keepdims=True))

    half = textbook(unit(student), unit(teacher), counted, "mse") / 2
    np.testing.assert_allclose(value, half, rtol=1e-6)
