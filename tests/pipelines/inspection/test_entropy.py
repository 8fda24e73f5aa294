"""Entropy of stored distributions, compared with the dense distribution in float64."""

import numpy as np
import pytest

from decant.pipelines.inspection.entropy import entropies
from tests.formulas import sampling


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_the_entropy_of_a_stored_distribution_is_that_of_the_dense_one(spread):
    logits = np.random.default_rng(0).normal(size=(50, 3000)) * spread
    targets = sampling.with_draws(logits, np.zeros(50), k=8, m=1)
    logp = sampling.log_softmax(logits)
    exact = -(np.exp(logp) * logp).sum(1)
    entropy = entropies(targets.logprobs, targets.tail_logmass)
    np.testing.assert_allclose(entropy, exact, atol=0.01)


def test_an_empty_tail_adds_no_entropy():
    logprobs = np.log(np.full((1, 4), 0.25, np.float32))
    assert entropies(logprobs, np.full((1, 7), -np.inf, np.float32)) == pytest.approx(np.log(4))
