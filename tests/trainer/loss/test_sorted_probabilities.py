"""ULD and GOLD against formulas in float64, and their gradients against finite differences."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decant.trainer.config import Loss
from decant.trainer.loss.targets import BatchTargets
from tests.formulas import by_rank, dense
from tests.making.heads import SIZE, THEIRS, fused, head_inputs, matched_inputs


def inputs(kind, k, seed=0):
    """As `matched_inputs`, whose partners only GOLD takes."""
    *given, partners = matched_inputs(seed, k=k)
    return *given, partners if kind == "gold" else None


def head(kind, hidden, unembedding, targets, **inputs):
    """As `fused`, always with the same static settings, so that few heads are compiled."""
    return fused(hidden, unembedding, targets, divergence=kind, mix=0.3, chunk_tokens=4, **inputs)


def formula(kind, k, partner, temperature):
    if kind == "gold":
        return partial(by_rank.known_gold, k=k, partner=partner, mix=0.3, temperature=temperature)
    return lambda p, q: temperature * by_rank.known_uld(p, q, k)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [5, THEIRS])
@pytest.mark.parametrize("kind", ["uld", "gold"])
def test_values_and_gradients_are_those_of_the_formula(kind, k, temperature):
    teacher, hidden, unembedding, targets, partner, partners = inputs(kind, k)
    inputs_of_head = {"temperature": temperature, "alpha": 0.7, "partners": partners}
    value, sums, d_hidden, d_unembedding = head(
        kind, hidden, unembedding, targets, **inputs_of_head
    )

    def exact(hidden, unembedding):
        soft = formula(kind, k, partner, temperature)
        settings = {"temperature": temperature, "alpha": 0.7}
        return by_rank.loss(teacher, hidden, unembedding, targets, soft, **settings)

    np.testing.assert_allclose(value, exact(hidden, unembedding), rtol=1e-5)
    assert sums.taught == targets.mask.sum()
    rng = np.random.default_rng(1)
    for _ in range(4):
        along = [rng.normal(size=x.shape) * 1e-6 for x in (hidden, unembedding)]
        ends = [exact(hidden + s * along[0], unembedding + s * along[1]) for s in (1, -1)]
        slope = sum((d * x).sum() for d, x in zip((d_hidden, d_unembedding), along, strict=True))
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2, rtol=2e-3, atol=2e-3 * 1e-7)


def test_with_every_token_stored_uld_is_the_sum_over_all_ranks():
    teacher, hidden, unembedding, targets, *_ = inputs("uld", THEIRS)
    got, *_ = head("uld", hidden, unembedding, targets)
    settings = {"temperature": 1.0, "alpha": 1.0}
    expected = by_rank.loss(teacher, hidden, unembedding, targets, by_rank.uld, **settings)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_with_few_tokens_stored_uld_is_a_lower_bound(seed):
    teacher, hidden, unembedding, targets, *_ = inputs("uld", 5, seed)
    got, *_ = head("uld", hidden, unembedding, targets)
    settings = {"temperature": 1.0, "alpha": 1.0}
    most = by_rank.loss(teacher, hidden, unembedding, targets, by_rank.uld, **settings)
    assert 0 <= got <= most * (1 + 1e-5)


def test_uld_on_the_same_vocabulary_does_not_look_at_ids():
    _, hidden, unembedding, targets = head_inputs(k=4, vocabulary=SIZE, length=6)
    other = targets._replace(topk_ids=(targets.topk_ids + 7) % SIZE)
    values = [head("uld", hidden, unembedding, each)[0] for each in (targets, other)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_two_stored_tokens_by_hand():
    """Teacher ½, ¼ and ¼ of others; the student's four tokens have ¼ each: ¼ + 0 + |¼ − ½|."""
    targets = BatchTargets(
        labels=np.array([[1]], np.int32),
        mask=np.array([[True]]),
        topk_ids=np.array([[[0, 1]]], np.int32),
        topk_logprobs=np.log(np.array([[[0.5, 0.25]]], np.float32)),
        tail_logmass=np.log(2 * 0.125**dense.BETAS)[None, None].astype(np.float32),
    )
    hidden, unembedding = np.ones((1, 1, 1), np.float32), np.zeros((1, 4), np.float32)
    value, *_ = fused(hidden, unembedding, targets, divergence="uld")
    np.testing.assert_allclose(value, 0.5, rtol=1e-6)


def test_a_likeliest_token_without_a_partner_is_no_agreement():
    *_, hidden, unembedding, targets, _, _ = inputs("uld", THEIRS)
    _, sums, *_ = head("uld", hidden, unembedding, targets)
    best = np.argmax(hidden @ unembedding, -1)
    own = targets.topk_logprobs[..., 0] > targets.unmatched[..., 0]
    expected = (targets.mask & own & (best == targets.topk_ids[..., 0])).sum()
    assert sums.agreement == expected


@pytest.mark.parametrize("kind", ["uld", "gold"])
def test_other_tails_are_refused(kind):
    with pytest.raises(ValueError, match=r"Leave loss\.tail out"):
        Loss(divergence=kind, tail="sketch")
