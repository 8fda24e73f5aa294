"""The tail's mass between the nodes, compared with dense float64."""

import numpy as np
import pytest

from decant.schemas.targets.targets import BETAS, EIGHTHS, tail_logmass_at, tail_size_logmass


def dense(logits: np.ndarray, *, k: int, betas=BETAS) -> tuple[np.ndarray, np.ndarray]:
    """(log-probs float64 [n, V] sorted descending, A at the nodes)."""
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ordered = -np.sort(-logprobs, axis=-1)
    tail = ordered[:, k:]
    return ordered, np.stack([np.log(np.exp(b * tail).sum(-1)) for b in betas], -1)


@pytest.mark.parametrize("temperature", [1.0, 1.3, 2.0, 2.5, 4.0, 10.0, 1000.0])
@pytest.mark.parametrize("spread", [1.0, 3.0])
@pytest.mark.parametrize("betas", [BETAS, EIGHTHS])
def test_any_temperature_above_one_is_within_2e_6_nats_of_dense(temperature, spread, betas):
    rng = np.random.default_rng(0)
    logprobs, nodes = dense(rng.normal(size=(64, 5000)) * spread, k=16, betas=betas)
    beta = 1 / temperature
    exact = np.log(np.exp(beta * logprobs[:, 16:]).sum(-1))
    ours = tail_logmass_at(nodes.astype(np.float32), np.float32(beta))
    head = np.log(np.exp(beta * logprobs[:, :16]).sum(-1))
    t_exact = np.exp(exact - np.logaddexp(head, exact))
    t_ours = np.exp(ours - np.logaddexp(head, ours.astype(np.float64)))
    kl = t_exact * np.log(t_exact / t_ours) + (1 - t_exact) * np.log((1 - t_exact) / (1 - t_ours))
    assert np.abs(kl).max() < 2e-6


@pytest.mark.parametrize("betas", [BETAS, EIGHTHS])
def test_nodes_are_reproduced(betas):
    _, nodes = dense(np.random.default_rng(1).normal(size=(8, 300)), k=4, betas=betas)
    for i, beta in enumerate(betas):
        np.testing.assert_allclose(tail_logmass_at(nodes, beta), nodes[:, i], atol=1e-12)


def test_an_empty_tail_stays_empty_and_its_neighbours_finite():
    _, nodes = dense(np.random.default_rng(1).normal(size=(2, 300)), k=4)
    nodes[0] = -np.inf
    empty, other = tail_logmass_at(nodes, 0.3)
    assert empty == -np.inf
    assert np.isfinite(other)


def test_the_node_at_zero_counts_ids():
    assert tail_size_logmass(vocabulary=100, k=99) == 0
    assert tail_size_logmass(vocabulary=100, k=100) == -np.inf
