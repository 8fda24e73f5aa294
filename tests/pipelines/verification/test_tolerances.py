"""Tolerances hold for few values as for many."""

import numpy as np

from decant.pipelines.verification.tolerances import STORED_DRAWS


def failing(errors):
    """The share of the samples, one a row, whose mean or 99th percentile is above its limit."""
    limits = STORED_DRAWS["compact"].of_few(errors.shape[1])
    above = errors.mean(1) > limits.mean
    return (above | (np.quantile(errors, 0.99, axis=1) > limits.p99)).mean()


def test_a_handful_of_sound_values_is_fine_and_a_fault_among_them_is_not():
    """Draws are stored in eighths of a nat: a sound one is off by 1/16 at most."""
    random = np.random.default_rng(0)
    for count in (4, 10, 100, 10_000):
        sound = random.uniform(0, 1 / 16, (300, count))
        assert failing(sound) == 0
        assert failing(sound + 1 / 8) == 1  # the neighbouring eighth
