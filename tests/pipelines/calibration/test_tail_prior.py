"""The tail prior's sums on the device, compared with the definition in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from decant.models.mesh.vocabulary import Vocabulary
from decant.pipelines.calibration.tail_prior import prior_sums
from decant.pipelines.teacher.sharded_head import Head
from decant.schemas.targets.prior import TailPrior, log_prior
from decant.schemas.targets.targets import BETAS
from tests.formulas import sampling

VOCABULARY, K, TOKENS = 600, 9, 37


def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(TOKENS, 12)).astype(np.float32)
    unembedding = rng.normal(size=(12, VOCABULARY)).astype(np.float32)
    return hidden, unembedding, rng.random(TOKENS) < 0.7


@pytest.mark.parametrize(("chunk", "softcap"), [(5, None), (64, None), (64, 2.0)])
def test_sums_and_counts_are_those_of_the_definition(chunk, softcap):
    hidden, unembedding, counted = inputs()
    arrays = map(jnp.asarray, (hidden, unembedding, counted))
    head = Head(Vocabulary(VOCABULARY), softcap)
    sums, counts = prior_sums(*arrays, k=K, head=head, chunk=chunk)
    logits = hidden.astype(np.float64) @ unembedding
    logits = softcap * np.tanh(logits / softcap) if softcap else logits
    tail = sampling.tail_of(logits, K) & counted[:, None]
    for node, beta in enumerate(BETAS[1:]):
        p = np.exp(sampling.log_softmax(beta * logits))
        np.testing.assert_allclose(sums[node], np.where(tail, p, 0).sum(0), rtol=1e-4)
    np.testing.assert_array_equal(counts, tail.sum(0))


def test_parts_add_up_before_they_are_divided():
    one = TailPrior(np.full((6, 3), 0.2), np.array([1.0, 1, 2]))
    two = TailPrior(np.full((6, 3), 0.4), np.array([1.0, 3, 0]))
    pi = np.exp(log_prior([one, two]))
    np.testing.assert_allclose(pi[0], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(pi[1:], np.tile([0.3, 0.15, 0.3], (6, 1)), rtol=1e-6)


def test_a_token_that_was_never_in_a_tail_gets_the_smallest_prior():
    prior = TailPrior(np.tile([0.5, 0.0, 0.1, 0.0], (6, 1)), np.array([2.0, 0, 1, 5]))
    logs = log_prior([prior])
    np.testing.assert_allclose(np.exp(logs[1:]), np.tile([0.25, 0.1, 0.1, 0.1], (6, 1)), rtol=1e-6)


def test_an_empty_prior_is_uniform_and_finite():
    logs = log_prior([TailPrior(np.zeros((6, 4)), np.zeros(4))])
    assert np.isfinite(logs).all()
    assert (np.ptp(logs, axis=1) == 0).all()
