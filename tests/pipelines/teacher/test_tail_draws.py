"""Tail draws on the device, compared with the definition in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from decant.models.mesh.vocabulary import Vocabulary
from decant.pipelines.teacher.sharded_head import Head
from decant.pipelines.teacher.tail_draws import draw
from decant.pipelines.teacher.targets import (
    LogitsSpec,
    TokenInputs,
    targets,
    targets_of_logits,
)
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.draws import Draws, logweights, uniform_starts
from decant.schemas.targets.targets import BETAS, tail_logmass_at
from tests.formulas import sampling

MANY_STARTS = ((np.arange(4000) + 0.5) / 4000).astype(np.float32)


def logits_of(vocabulary: int, *, n: int, seed: int = 0, spread: float = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, vocabulary)).astype(np.float32) * spread


def numpy_targets(logits: np.ndarray, at: np.ndarray, spec: TargetSpec) -> dict[str, np.ndarray]:
    fields = targets_of_logits(
        jnp.asarray(logits),
        TokenInputs(jnp.asarray(at)),
        spec=LogitsSpec(spec),
        vocabulary=Vocabulary(logits.shape[1]),
    )
    return {name: np.asarray(x) for name, x in fields.items()}


def draw_at(weights: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = jnp.asarray(weights)
    here = Vocabulary(weights.shape[1])
    ids, of_ids, near = draw(values, jnp.asarray(points), values=values, vocabulary=here)
    np.testing.assert_array_equal(of_ids, np.take_along_axis(weights, np.asarray(ids), axis=1))
    return np.asarray(ids), np.asarray(near)


@pytest.mark.parametrize("vocabulary", [3, 128, 129, 5000, 50_021])
def test_each_point_finds_the_token_in_whose_share_it_lies(vocabulary):
    rng = np.random.default_rng(vocabulary)
    weights = rng.exponential(size=(9, vocabulary)).astype(np.float32)
    weights[rng.random(weights.shape) < 0.3] = 0
    weights[:, 1] = 1
    points = rng.random((9, 16)).astype(np.float32) * weights.sum(1, keepdims=True) * 0.999
    ids, near = draw_at(weights, points)
    expected = sampling.ids_at(weights.astype(np.float64), points.astype(np.float64))
    surely = ~np.asarray(near)
    assert surely.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(ids)[surely], expected[surely])


def test_a_point_at_the_very_end_or_beyond_finds_a_token_with_weight():
    weights = np.zeros((2, 1000), np.float32)
    weights[0, [3, 700]] = 0.1, 0.2
    weights[1, 128:256] = 0.1
    total = weights.sum(1, keepdims=True)
    points = total * np.array([[0, 1 - 1e-7, 1, 1.1]], np.float32)
    ids, _ = draw_at(weights, points)
    np.testing.assert_array_equal(ids, [[3, 700, 700, 700], [128, 255, 255, 255]])


def test_points_at_the_seams_of_blocks_find_tokens_with_weight():
    """The sums of blocks round differently from the sums inside a block."""
    weights = np.random.default_rng(0).exponential(size=(20, 128 * 60)).astype(np.float32)
    weights[:, ::128] = weights[:, 127::128] = 0
    seams = np.cumsum(weights.reshape(20, 60, 128).sum(-1, dtype=np.float32), 1, dtype=np.float32)
    points = np.concatenate([np.nextafter(seams, 0), seams, np.nextafter(seams, np.inf)], axis=1)
    ids, _ = draw_at(weights, points)
    assert (np.take_along_axis(weights, np.asarray(ids), axis=1) > 0).all()


@pytest.mark.parametrize("betas", [(1.0,), (0.5, 1.0), (1 / 8, 3 / 4, 1.0)])
def test_a_token_is_drawn_as_often_as_the_proposal_says(betas):
    """Over starts spread evenly, the mean number of draws of v is m·r(v)."""
    vocabulary, k, m = 300, 5, 7
    logits = np.repeat(logits_of(vocabulary, n=1), len(MANY_STARTS), axis=0)
    fields = numpy_targets(logits, MANY_STARTS, TargetSpec(k, m, betas))
    often = np.bincount(fields["tail_ids"].reshape(-1), minlength=vocabulary) / len(MANY_STARTS)
    r = sampling.proposal(logits[:1], k=k, betas=betas)[0]
    np.testing.assert_allclose(often, m * r, atol=3 * m / len(MANY_STARTS))
    assert not np.isin(fields["tail_ids"], fields["ids"][0]).any()
    logp = sampling.log_softmax(logits[:1])[0]
    np.testing.assert_allclose(fields["tail_logprobs"], logp[fields["tail_ids"]], atol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_weighted_draws_estimate_any_sum_over_the_tail(temperature):
    vocabulary, k, m, betas = 300, 5, 7, (0.5, 1.0)
    logits = np.repeat(logits_of(vocabulary, n=1), len(MANY_STARTS), axis=0)
    fields = numpy_targets(logits, MANY_STARTS, TargetSpec(k, m, betas))
    draws = Draws(fields["tail_ids"], fields["tail_logprobs"], betas)
    weights = logweights(draws, fields["tail_logmass"], nodes=BETAS)
    function = np.random.default_rng(1).normal(size=vocabulary)
    p = np.exp(sampling.log_softmax(logits[:1])[0] / temperature)
    tail = sampling.tail_of(logits[:1], k)[0]
    of_draws = np.exp(draws.logprobs / temperature + weights) * function[draws.ids]
    estimate = of_draws.astype(np.float64).sum(1).mean()
    np.testing.assert_allclose(estimate, (p * function)[tail].sum(), rtol=0.01)


def test_of_equal_logits_only_those_outside_the_top_k_are_drawn():
    logits = np.zeros((64, 40), np.float32)
    fields = numpy_targets(logits, MANY_STARTS[::63][:64], TargetSpec(7, 5, (1.0,)))
    np.testing.assert_array_equal(np.unique(fields["tail_ids"]), np.arange(7, 40))


@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_the_chunk_changes_no_draw_that_is_not_counted_as_near(chunk):
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(30, 16)), jnp.float32)
    unembedding = jnp.asarray(rng.normal(size=(16, 3000)), jnp.float32)
    at = TokenInputs(jnp.asarray(rng.random(30), jnp.float32))
    spec = LogitsSpec(TargetSpec(5, 8, (0.5, 1.0)))
    asked = {"spec": spec, "head": Head(Vocabulary(unembedding.shape[1]))}
    whole = targets(hidden, unembedding, at, **asked)
    cut = targets(hidden, unembedding, at, **asked, chunk=chunk)
    surely = ~np.asarray(whole["near_edge"])
    assert surely.mean() > 0.9
    np.testing.assert_array_equal(
        np.asarray(whole["tail_ids"])[surely], np.asarray(cut["tail_ids"])[surely]
    )


def test_starts_are_a_function_of_the_row_and_spread_evenly():
    first, again, other = (uniform_starts(key * 16, positions=4096) for key in (b"a", b"a", b"b"))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.99
    assert 0 <= first.min() <= first.max() < 1
    counts = np.histogram(first, bins=16, range=(0, 1))[0]
    assert np.abs(counts - 256).max() < 80  # five standard deviations
    np.testing.assert_array_equal(uniform_starts(b"a" * 16, positions=9), first[:9])


def test_the_grid_is_exact_enough_between_nodes_for_draws_at_any_temperature():
    """Weights at T = 1.7, where no node is: against float64 sums over the tail."""
    logits = logits_of(2000, n=50)
    fields = numpy_targets(logits, np.full(50, 0.3, np.float32), TargetSpec(8, 4, (1.0,)))
    logp, tail = sampling.log_softmax(logits), sampling.tail_of(logits, 8)
    exact = np.log(np.where(tail, np.exp(logp / 1.7), 0).sum(1))
    np.testing.assert_allclose(tail_logmass_at(fields["tail_logmass"], 1 / 1.7), exact, atol=1e-4)
