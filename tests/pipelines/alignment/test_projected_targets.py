"""Heads, counts and sketches over the student's ids, against a dense float64 computation."""

import numpy as np
import pytest

from decant.pipelines.alignment.dense import DenseProjection
from decant.pipelines.alignment.heads import matched_head, project_counts, project_head
from decant.pipelines.alignment.positions import Positions, positions_of
from decant.pipelines.teacher.targets import LogitsSpec, TokenInputs
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.counts import Counts
from decant.schemas.targets.sketch import SketchHead
from decant.schemas.targets.targets import BETAS

TEACHERS, STUDENTS, N = 14, 9, 40
FIRST = np.array([0, 1, 2, 3, 4, 5, 2, 2, 6, 6, 7, 0, 3, 5], np.int32)
"""The student's id 8 begins no token of the teacher's: it gets only what the chain rule gives."""


def teacher(seed=0, first=FIRST):
    """Distributions float64 [N, TEACHERS], and positions of which some labels span tokens."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(TEACHERS, 0.4), N)
    following = np.array([rng.choice(TEACHERS, p=row) for row in p], np.int32)
    spanning = np.arange(N) % 3 == 0
    label = np.where(spanning, 8, first[following]).astype(np.int32)
    rest = np.where(spanning, np.log(rng.uniform(0.1, 0.9, N)), -np.inf)
    own = np.log(p[np.arange(N), following])
    return p, Positions(following, label, own, rest, first[following])


def projected(p, at, first=FIRST):
    """The textbook: every id's mass to its first, the label's share moved, rescaled to one."""
    q = np.zeros((len(p), STUDENTS))
    for row in range(len(p)):
        for v, s in enumerate(first):
            if s >= 0:
                q[row, s] += p[row, v]
        if at.first[row] != at.label[row]:
            share = p[row, at.following[row]] * np.exp(at.rest[row])
            q[row, at.first[row]] -= share
            q[row, at.label[row]] += share
    return q / q.sum(1, keepdims=True)


def top(p, k):
    ids = np.argsort(-p, axis=1, kind="stable")[:, :k].astype(np.int32)
    logprobs = np.log(np.take_along_axis(p, ids, 1))
    with np.errstate(divide="ignore"):
        return ids, logprobs, np.log(np.maximum(1 - np.exp(logprobs).sum(1), 0))


def dense_of(targets):
    q = np.zeros((len(targets), STUDENTS))
    for row in range(len(q)):
        held = np.isfinite(targets.logprobs[row])
        assert len(set(targets.ids[row, held])) == held.sum()
        q[row, targets.ids[row, held]] = np.exp(targets.logprobs[row, held])
    return q


def test_with_every_token_stored_the_head_is_the_projected_distribution():
    p, at = teacher()
    ids, logprobs, tail = top(p, TEACHERS)
    targets = project_head(ids, logprobs, tail, at, first=FIRST, size=STUDENTS, betas=BETAS)
    expected = projected(p, at)
    # Sizes are rungs of a ladder, so the last ids of some positions are in the tail.
    off = np.abs(dense_of(targets) - expected)[dense_of(targets) > 0]
    assert off.max() < 1e-6
    own = expected[np.arange(N), at.label]
    np.testing.assert_allclose(np.exp(targets.label_logprobs), own, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_head_and_tail_of_part_of_the_tokens_sum_to_one_and_never_claim_too_much(k):
    p, at = teacher(1)
    ids, logprobs, tail = top(p, k)
    targets = project_head(ids, logprobs, tail, at, first=FIRST, size=STUDENTS, betas=BETAS)
    q = dense_of(targets)
    np.testing.assert_allclose(q.sum(1) + np.exp(targets.tail_logmass[:, -1]), 1, atol=1e-6)
    assert (q <= projected(p, at) + 1e-6).all()
    assert ((q > 0).sum(1) == targets.sizes).all()


def test_tokens_that_the_student_cannot_spell_are_left_out_and_the_rest_grows():
    first = FIRST.copy()
    first[[4, 10]] = -1
    p, at = teacher(2)
    keep = first[at.following] >= 0
    p, at = p[keep], at[keep]
    ids, logprobs, tail = top(p, TEACHERS)
    targets = project_head(ids, logprobs, tail, at, first=first, size=STUDENTS, betas=BETAS)
    held = dense_of(targets) > 0
    expected = projected(p, at, first)
    np.testing.assert_allclose(dense_of(targets)[held], expected[held], atol=1e-6)


def counts_at(p, start, draws):
    """Equally spaced draws, looked up one by one."""
    ids = np.zeros((len(p), TEACHERS), np.int32)
    counts = np.zeros((len(p), TEACHERS), np.int32)
    for row in range(len(p)):
        ends = np.cumsum(p[row])
        found = np.searchsorted(ends, (np.arange(draws) + start) / draws * ends[-1], side="right")
        drawn = np.bincount(found, minlength=TEACHERS)
        some = np.flatnonzero(drawn)
        ids[row, : len(some)], counts[row, : len(some)] = some, drawn[some]
    return Counts(ids, counts, draws)


def test_counts_are_right_on_average_and_keep_their_sum():
    p, at = teacher(3)
    total = np.zeros((N, STUDENTS))
    starts = (np.arange(40) + 0.5) / 40
    for start in starts:
        for own in (np.arange(10) + 0.5) / 10:
            some, made = project_counts(
                counts_at(p, start, 20),
                at,
                first=FIRST,
                starts=np.full(N, own),
                size=STUDENTS,
            )
            assert made.all()
            assert (some.counts.sum(1) == 20).all()
            for slot in range(some.ids.shape[1]):
                total[np.arange(N), some.ids[:, slot]] += some.counts[:, slot]
    mean = total / total.sum(1, keepdims=True)
    np.testing.assert_allclose(mean, projected(p, at), atol=4e-3)


def test_draws_of_tokens_that_cannot_be_spelt_are_replaced():
    first = FIRST.copy()
    first[[4, 10]] = -1
    p, at = teacher(4)
    some, made = project_counts(
        counts_at(p, 0.3, 50), at, first=first, starts=np.full(N, 0.4), size=STUDENTS
    )
    assert (some.counts.sum(1)[made] == 50).all()
    only = np.zeros((1, TEACHERS), np.int32)
    ids, counts = only.copy(), only.copy()
    ids[0, 0], counts[0, 0] = 4, 50
    _, made = project_counts(
        Counts(ids, counts, 50), at[:1], first=first, starts=np.full(1, 0.4), size=STUDENTS
    )
    assert not made.any()


def sketched(p, k=3):
    """A head of k ids and a sketch of full rank, whose logits are log p."""
    ids, logprobs, tail = top(p, k)
    head = SketchHead(np.eye(TEACHERS, dtype=np.float32), np.zeros(TEACHERS, np.float32))
    nodes = np.zeros((len(p), len(BETAS)))
    nodes[:, -1] = tail
    arrays = {"topk_logprobs": logprobs, "tail_logmass": nodes, "sketch": np.log(p) + 3}
    batch = {name: x.astype(np.float32) for name, x in arrays.items()}
    return head, {**batch, "topk_ids": ids}


def test_by_a_sketch_the_targets_serve_every_temperature():
    p, at = teacher(5)
    head, batch = sketched(p)
    spec = LogitsSpec(TargetSpec(k=4))
    dense = DenseProjection(head, first=FIRST, size=STUDENTS, spec=spec)
    fields = dense(batch, at, TokenInputs())
    q = projected(p, at)
    ids = np.argsort(-q, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(fields["ids"], ids)
    np.testing.assert_allclose(np.exp(fields["logprobs"]), np.take_along_axis(q, ids, 1), atol=2e-6)
    np.put_along_axis(q, ids, 0, 1)
    for node, beta in enumerate(BETAS[1:], start=1):
        tail = np.where(q > 1e-12, np.maximum(q, 1e-30) ** beta, 0).sum(1)
        some = tail > 1e-5
        own = fields["tail_logmass"][some, node]
        np.testing.assert_allclose(own, np.log(tail[some]), atol=2e-3, err_msg=str(beta))
    own = projected(p, at)[np.arange(N), at.label]
    np.testing.assert_allclose(np.exp(fields["label_logprobs"]), own, rtol=1e-4)


def test_counts_drawn_by_a_sketch_are_right_on_average():
    p, at = teacher(6)
    head, batch = sketched(p)
    dense = DenseProjection(
        head, first=FIRST, size=STUDENTS, spec=LogitsSpec(TargetSpec(k=2), counts=10)
    )
    total = np.zeros((N, STUDENTS))
    for start in (np.arange(50) + 0.5) / 50:
        starts = TokenInputs(counts_starts=np.full(N, start, np.float32))
        for ids in dense(batch, at, starts)["count_ids"].T:
            total[np.arange(N), ids] += 1
    np.testing.assert_allclose(total / 500, projected(p, at), atol=2e-3 + 1 / 500)


def test_a_label_over_several_tokens_has_the_product_of_their_probabilities():
    stored = np.log(np.array([0.5, 0.25, 0.1, 0.9], np.float32))
    at = positions_of(
        np.array([0, 0, 1]),
        np.array([3, 1, 0], np.int32),
        np.array([7, 7, 5], np.int32),
        tokens=np.array([1, 2, 3, 4, 5]),
        label_logprobs=np.append(stored, -np.inf),
        first=np.arange(10, dtype=np.int32),
    )
    np.testing.assert_array_equal(at.following, [2, 2, 3])
    np.testing.assert_allclose(at.moved, [0.25 * 0.1, 1, 0], rtol=1e-6)
    np.testing.assert_array_equal(at.known, [True, True, False])


def test_matched_heads_keep_the_teachers_order_and_number_what_has_no_partner():
    ids = np.array([[3, 1, 0, 2]], np.int32)
    logprobs = np.log([[0.4, 0.3, 0.2, 0.1]])
    partners = np.array([5, 6, 6, -1])
    own = matched_head(ids, logprobs, partners=partners, size=100)
    np.testing.assert_array_equal(own, [[100, 6, 5, 103]])
