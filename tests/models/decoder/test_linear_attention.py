"""Linear attention in chunks against the rule, position by position in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decant.models.decoder.linear_attention import convolve, gated_delta_rule

GROUPS, SHARED, KEY, VALUE = 2, 3, 8, 6


def one_by_one(q, k, v, log_decays, rates, segments):
    """The rule in the words of its paper: decay, then write what the key does not give yet."""
    out, matrix = np.zeros(v.shape), np.zeros((*v.shape[:1], *v.shape[2:4], KEY, VALUE))
    for b, t, g, r in np.ndindex(*v.shape[:4]):
        if t == 0 or segments[b, t] != segments[b, t - 1]:
            matrix[b, g, r] = 0
        matrix[b, g, r] *= np.exp(log_decays[b, t, g, r])
        missing = v[b, t, g, r] - matrix[b, g, r].T @ k[b, t, g]
        matrix[b, g, r] += rates[b, t, g, r] * np.outer(k[b, t, g], missing)
        out[b, t, g, r] = matrix[b, g, r].T @ q[b, t, g]
    return out, matrix


def inputs(time):
    """Two rows; a segment begins inside a chunk. The key of the last half is one key, repeated."""
    draw = np.random.default_rng(0)
    q, k = draw.normal(size=(2, 2, time, GROUPS, KEY))
    k[:, time // 2 :] = k[:, time // 2 : time // 2 + 1]
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = draw.normal(size=(2, time, GROUPS, SHARED, VALUE))
    log_decays = -np.exp(2 * draw.normal(size=v.shape[:4]) - 3)
    rates = 1 / (1 + np.exp(-draw.normal(size=v.shape[:4]) - 2))
    first = np.array([[time // 3], [time // 5]])
    segments = 1 + (np.arange(time) >= first).astype(np.int32)
    return (q, k, v, log_decays, rates), segments


def in_float32(arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


rule = jax.jit(gated_delta_rule)


@pytest.mark.parametrize("time", [5, 150])
def test_outputs_and_matrices_are_those_of_the_rule_position_by_position(time):
    arrays, segments = inputs(time)
    out, matrix = rule(*in_float32(arrays), segments)
    expected, last = one_by_one(*arrays, segments)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(matrix, last, atol=2e-5)
    assert np.abs(expected).max() > 1


def test_a_row_may_go_on_from_the_matrix_of_its_beginning():
    arrays, segments = inputs(150)
    whole, last = rule(*in_float32(arrays), segments)
    _, kept = rule(*in_float32(x[:, :149] for x in arrays), segments[:, :149])
    out, matrix = rule(*in_float32(x[:, 149:] for x in arrays), segments[:, 149:], kept)
    np.testing.assert_allclose(out, whole[:, 149:], atol=1e-5)
    np.testing.assert_allclose(matrix, last, atol=1e-5)


def test_slopes_are_those_of_the_rule():
    arrays, segments = inputs(70)
    draw = np.random.default_rng(1)
    towards = draw.normal(size=arrays[2].shape)

    def value(*arrays):
        return jnp.sum(gated_delta_rule(*arrays, jnp.asarray(segments))[0] * towards)

    slopes = jax.jit(jax.grad(value, argnums=tuple(range(5))))(*in_float32(arrays))
    for number, (array, slope) in enumerate(zip(arrays, slopes, strict=True)):
        step = draw.normal(size=array.shape)
        ends = []
        for sign in (1, -1):
            moved = [*arrays]
            moved[number] = array + sign * 1e-5 * step
            ends.append(np.sum(one_by_one(*moved, segments)[0] * towards))
        along = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(np.sum(np.asarray(slope, np.float64) * step), along, rtol=1e-3)


def test_a_convolution_sums_the_last_positions_of_its_segment():
    draw = np.random.default_rng(0)
    x, taps = draw.normal(size=(1, 9, 5)), draw.normal(size=(4, 5))
    segments = np.array([[0, 1, 1, 1, 1, 1, 2, 2, 2]])
    out, kept = jax.jit(convolve)(*in_float32((x, taps)), segments)
    for t in range(9):
        own = [s for s in range(max(t - 3, 0), t + 1) if segments[0, s] == segments[0, t]]
        total = sum(x[0, s] * taps[3 - (t - s)] for s in own)
        np.testing.assert_allclose(out[0, t], total / (1 + np.exp(-total)), atol=1e-6)
    np.testing.assert_allclose(kept[0], x[0, 6:], atol=1e-6)
    _, begun = convolve(*in_float32((x[:, :8], taps)), jnp.asarray(segments[:, :8]))
    np.testing.assert_array_equal(begun[0, 0], 0)  # of the segment before
    again, _ = convolve(*in_float32((x[:, 8:], taps)), jnp.asarray(segments[:, 8:]), begun)
    np.testing.assert_allclose(again, out[:, 8:], atol=1e-6)
