"""Codes of hidden states and attention maps: precision, in numpy and in jax."""

import jax.numpy as jnp
import numpy as np
import pytest

from decant.schemas.targets.attention import decode_log, encode_log
from decant.schemas.targets.hidden import decode_int8, encode_int8

BACKENDS = pytest.mark.parametrize("xp", [np, jnp])


def relative_error(states: np.ndarray, *, xp=np) -> np.ndarray:
    codes, scale = encode_int8(xp.asarray(states), xp=xp)
    assert codes.dtype == np.int8
    assert scale.shape == states.shape[:-1]
    decoded = np.asarray(decode_int8(codes, scale, xp=xp), np.float64)
    return np.linalg.norm(decoded - states, axis=-1) / np.linalg.norm(states, axis=-1)


@BACKENDS
@pytest.mark.parametrize("width", [1, 6, 7, 64, 96, 576, 1024])
def test_int8_is_off_by_less_than_a_percent_at_any_width(xp, width):
    states = np.random.default_rng(width).standard_normal((50, width)).astype(np.float32)
    errors = relative_error(states, xp=xp)
    assert errors.mean() < 0.008
    assert errors.max() < 0.012  # a position whose largest number is 5 standard deviations out


@BACKENDS
@pytest.mark.parametrize("at", [0, 17, 575])
def test_a_coordinate_a_thousand_times_larger_leaves_the_others_their_codes(xp, at):
    """Without mixing, the other coordinates would get three codes, an error of 5%."""
    states = np.random.default_rng(at).standard_normal((50, 576)).astype(np.float32)
    states[:, at] = 1000
    assert relative_error(states, xp=xp).max() < 0.01


@BACKENDS
def test_zeros_stay_zeros(xp):
    codes, scale = encode_int8(xp.zeros((2, 576), np.float32), xp=xp)
    assert not np.asarray(codes).any()
    assert not np.asarray(decode_int8(codes, scale, xp=xp)).any()


def test_both_backends_give_the_same_codes():
    states = np.random.default_rng(0).standard_normal((20, 576)).astype(np.float32)
    ours, theirs = (np.asarray(encode_int8(xp.asarray(states), xp=xp)[0]) for xp in (np, jnp))
    differ = np.abs(ours.astype(int) - theirs) > 0
    assert differ.mean() < 1e-3  # rounding ties that differ in the last bit
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@BACKENDS
def test_a_probability_is_kept_within_half_a_step(xp):
    p = np.geomspace(1.2e-7, 1, 5000).astype(np.float32)
    codes = encode_log(xp.asarray(p), xp=xp)
    assert codes.dtype == np.uint8
    decoded = np.asarray(decode_log(codes, xp=xp), np.float64)
    assert np.abs(decoded / p - 1).max() < 0.032  # exp(16 / 254 / 2) − 1
    assert np.asarray(codes)[-1] == 255


@BACKENDS
def test_zero_and_next_to_nothing_are_zero_and_one_is_one(xp):
    codes = encode_log(xp.asarray([0.0, 1e-30, 1e-8, 1.0], np.float32), xp=xp)
    np.testing.assert_array_equal(np.asarray(decode_log(codes, xp=xp)), [0, 0, 0, 1])
