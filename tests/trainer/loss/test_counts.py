"""tail = "counts" against float64 formulas, and what is right on average."""

import numpy as np
import pytest

from tests.formulas import dense
from tests.making.heads import fused, head_inputs, relative, with_counts

V = 64


def without_head(targets):
    return targets._replace(
        topk_ids=targets.topk_ids[..., :0],
        topk_logprobs=targets.topk_logprobs[..., :0],
        tail_logmass=targets.tail_logmass[..., :0],
    )


@pytest.mark.parametrize("k", [0, 4, V])
def test_the_target_is_counts_over_n_and_the_kl_has_the_teachers_entropy(k):
    teacher, hidden, unembedding, targets = head_inputs(k=max(k, 1), vocabulary=V)
    targets = with_counts(targets, teacher)
    if not k:
        targets = without_head(targets)
    value, sums, *gradients = fused(hidden, unembedding, targets, alpha=0.7, tail="counts")
    p = dense.counted(targets.count_ids, targets.counts, vocabulary=V)
    rows = (teacher, hidden, unembedding, targets.labels, targets.mask)
    expected = dense.loss(*rows, temperature=1.0, alpha=0.7, p=p)
    # The formula's KL has the entropy of the counts; with a head it is the teacher's.
    true = np.exp(dense.log_softmax(teacher))
    more = dense.entropy(p) - dense.entropy(true) if k else 0 * targets.mask
    more = (targets.mask * more).sum()
    np.testing.assert_allclose(sums.kl, expected[1] + more, rtol=2e-4)
    np.testing.assert_allclose(value, expected[0] + 0.7 * more, rtol=2e-4)
    np.testing.assert_allclose(sums.ce, expected[2], rtol=3e-6)
    for ours, theirs in zip(gradients, expected[3:], strict=True):
        assert relative(ours, theirs) < 5e-6
    assert sums.taught == targets.mask.sum()


@pytest.mark.parametrize("k", [0, 4])
def test_agreement_is_with_the_likeliest_id_or_the_largest_count(k):
    teacher, hidden, unembedding, targets = head_inputs(k=4, vocabulary=V)
    targets = with_counts(targets, teacher)
    targets = targets if k else without_head(targets)
    student = np.argmax(hidden.astype(np.float64) @ unembedding, -1)
    counted = np.take_along_axis(targets.count_ids, np.argmax(targets.counts, -1)[..., None], -1)[
        ..., 0
    ]
    theirs = np.argmax(teacher, -1) if k else counted
    # Half of the positions agree, so that the number is not 0.
    labels = np.where(np.arange(student.size).reshape(student.shape) % 2, student, theirs)
    if k:
        targets.topk_ids[..., 0] = np.where(targets.mask, labels, 0)
        theirs = labels
    _, sums, *_ = fused(hidden, unembedding, targets, tail="counts")
    assert sums.agreement == (targets.mask & (student == theirs)).sum()


def test_gradient_cross_entropy_and_kl_are_right_on_average():
    """64 directions of the gradient in the unembedding, 256 redraws: |z| ≤ 4 in all of them."""
    teacher, hidden, unembedding, targets = head_inputs(k=4, vocabulary=V, batch=1)
    rows = (teacher, hidden, unembedding, targets.labels, targets.mask)
    _, kl, _, _, true = dense.loss(*rows, temperature=1.0, alpha=1.0)
    directions = np.random.default_rng(5).normal(size=(64, *true.shape))
    along = []
    for seed in range(256):
        drawn = with_counts(targets, teacher, seed=seed)
        value, _, _, gradient = fused(hidden, unembedding, drawn, tail="counts")
        along.append([value - kl, *np.tensordot(directions, gradient - true, 2)])
    errors = np.mean(along, axis=0) / (np.std(along, axis=0) / np.sqrt(len(along)))
    assert np.abs(errors).max() < 4


def test_for_judging_the_bound_is_given_beside_the_same_kl():
    teacher, hidden, unembedding, targets = head_inputs(k=4, vocabulary=V)
    drawn = with_counts(targets, teacher)
    alone = fused(hidden, unembedding, drawn, tail="counts")[1]
    both = fused(hidden, unembedding, drawn, tail="counts", bound=True)[1]
    bound, *_ = fused(hidden, unembedding, targets, tail="bucket")
    np.testing.assert_allclose(both.kl, alone.kl, rtol=1e-5)
    np.testing.assert_allclose(both.kl_uncorrected, bound, rtol=1e-6)
    none = fused(hidden, unembedding, without_head(drawn), tail="counts", bound=True)[1]
    assert none.kl_uncorrected == 0


def test_a_position_without_counts_is_learned_from_its_label_alone():
    teacher, hidden, unembedding, targets = head_inputs(k=4, vocabulary=V)
    targets = without_head(with_counts(targets, teacher))
    gone = targets.mask & (np.arange(targets.mask.size).reshape(targets.mask.shape) % 3 == 0)
    targets.counts[gone] = 0
    _, sums, d_hidden, _ = fused(hidden, unembedding, targets, alpha=0.5, tail="counts")
    labels = fused(hidden, unembedding, targets, alpha=0.0, tail="counts")[2]
    np.testing.assert_allclose(d_hidden[gone], labels[gone], rtol=1e-6)
    assert sums.taught == targets.mask.sum() - gone.sum()
    assert np.isfinite(sums.kl)
