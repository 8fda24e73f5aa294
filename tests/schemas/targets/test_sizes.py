"""Adaptive heads: the sizes of positions, and what joins the tail."""

import numpy as np
import pytest

from decant.schemas.targets.sizes import ladder, shortened, sizes_for
from decant.schemas.targets.targets import BETAS
from tests.schemas.codecs.test_codecs import from_logits, zipf_logits


def test_sizes_are_rungs_of_a_ladder_that_ends_with_k():
    assert ladder(20).tolist() == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert ladder(8).tolist() == [1, 2, 3, 4, 6, 8]
    assert ladder(1).tolist() == [1]
    assert ladder(0).tolist() == []


def test_a_position_stores_the_fewest_ids_that_hold_the_mass_up_to_the_next_rung():
    positions = 200  # enough for each size to be worth its own blocks
    kinds = [[0.96, 0.01, 0.01, 0, 0], [0.3, 0.3, 0.3, 0.06, 0.01], [0.1] * 5, [0.5, 0.3, 0, 0, 0]]
    with np.errstate(divide="ignore"):
        logprobs = np.log(np.repeat(kinds, positions, axis=0)).astype(np.float32)
    sizes = sizes_for(logprobs, mass=0.95)
    assert sizes[::positions].tolist() == [1, 4, 5, 5]
    assert sizes_for(logprobs[:0], mass=0.95).tolist() == []


def test_sizes_of_few_positions_move_up_to_the_next():
    probabilities = np.array([[0.99, 0.005, 0.001]] * 3 + [[0.5, 0.46, 0.01]] * 200)
    assert set(sizes_for(np.log(probabilities), mass=0.95).tolist()) == {2}
    # Nothing is above the last size.
    assert sizes_for(np.log(probabilities[:3]), mass=0.95).tolist() == [1, 1, 1]


@pytest.mark.parametrize("logs_of_0", [False, True])
def test_what_a_position_does_not_store_is_in_its_tail(logs_of_0):
    logits = zipf_logits(50, 300)
    if logs_of_0:
        logits[:, 2:] = -np.inf
    whole, sizes = from_logits(logits, k=12), np.array([1, 2, 3, 6, 12] * 10)
    short = shortened(whole, sizes)
    assert short.sizes is sizes
    for size in np.unique(sizes).tolist():
        alike = sizes == size
        expected = from_logits(logits[alike], k=size)
        np.testing.assert_array_equal(short.ids[alike, :size], expected.ids)
        np.testing.assert_array_equal(short.logprobs[alike, :size], expected.logprobs)
        np.testing.assert_allclose(short.tail_logmass[alike], expected.tail_logmass, atol=2e-6)
        assert (short.ids[alike, size:] == 0).all()
        assert (short.logprobs[alike, size:] == -np.inf).all()
    assert short.tail_logmass.shape == (50, len(BETAS))
