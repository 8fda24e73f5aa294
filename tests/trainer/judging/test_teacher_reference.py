"""The teacher's own figures, from its stored targets, against its whole distribution."""

import numpy as np
import pytest

from decant.schemas.records.rows import next_tokens
from decant.schemas.targets.targets import BETAS
from decant.trainer.judging.teacher_reference import teacher_ce, teacher_on_labels
from tests.formulas.dense import log_softmax
from tests.trainer.update.test_step import teacher_logits


@pytest.fixture(scope="module")
def heldout(whole_cache):
    return whole_cache.read(whole_cache.rows(split="heldout"))


@pytest.fixture(scope="module")
def truth(whole_cache, root, heldout):
    """The label's log-probability at each counted position, by the teacher itself."""
    logp = log_softmax(np.asarray(teacher_logits(whole_cache, root, heldout), np.float64))
    labels = next_tokens(heldout["tokens"])[..., None]
    return np.take_along_axis(logp, labels, -1)[..., 0][heldout["loss_mask"]]


def test_with_every_token_stored_the_cross_entropy_is_the_teachers(whole_cache, heldout, truth):
    got = teacher_on_labels(heldout)
    counted = heldout["loss_mask"]
    np.testing.assert_allclose(-got["teacher_ce"][counted], truth, atol=1e-4)
    np.testing.assert_array_equal(got["teacher_ce"][counted], got["teacher_ce_bound"][counted])
    assert got["teacher_known"][counted].all()


def test_with_label_logprobs_it_is_exact_everywhere(drawn_cache, truth):
    batch = drawn_cache.read(drawn_cache.rows(split="heldout"))
    got = {name: x[batch["loss_mask"]] for name, x in teacher_on_labels(batch).items()}
    np.testing.assert_allclose(-got["teacher_ce"], truth, atol=1e-4)
    assert got["teacher_known"].all()


def test_in_older_caches_it_is_exact_where_known_and_bounded_elsewhere(drawn_cache, truth):
    batch = drawn_cache.read(drawn_cache.rows(split="heldout"))
    del batch["label_logprobs"]
    got = teacher_on_labels(batch)
    got = {name: values[batch["loss_mask"]] for name, values in got.items()}
    known = got["teacher_known"] == 1
    assert 0.02 < known.mean() < 0.98
    np.testing.assert_allclose(-got["teacher_ce"][known], truth[known], atol=1e-4)
    assert (got["teacher_ce_bound"] <= -truth + 1e-4).all()
    assert (got["teacher_ce_bound"] <= got["teacher_ce"]).all()
    estimate, bound = got["teacher_ce"].mean(), got["teacher_ce_bound"].mean()
    assert abs(estimate + truth.mean()) < abs(bound + truth.mean())
    # Draws make more labels known than the top-k alone.
    plain = {name: values for name, values in batch.items() if not name.startswith("tail_id")}
    fewer = teacher_on_labels(plain)
    assert fewer["teacher_known"][batch["loss_mask"]].mean() < known.mean()


def test_four_tokens_by_hand():
    """p = ½, ¼, ⅛, ⅛; the first two are stored. Any token of the tail has ⅛, at most ¼."""
    batch = {
        "tokens": np.array([[0, 1, 2, 3, 0]]),
        "topk_ids": np.tile(np.array([0, 1]), (1, 5, 1)),
        "topk_logprobs": np.log(np.tile(np.array([1 / 2, 1 / 4]), (1, 5, 1))),
        "tail_logmass": np.tile(np.log(2) - np.array(BETAS) * np.log(8), (1, 5, 1)),
    }
    got = teacher_on_labels(batch)
    np.testing.assert_allclose(np.exp(-got["teacher_ce"][0, :3]), [1 / 4, 1 / 8, 1 / 8])
    np.testing.assert_allclose(np.exp(-got["teacher_ce_bound"][0, :3]), [1 / 4, 1 / 4, 1 / 4])
    assert got["teacher_known"][0, :4].tolist() == [1, 0, 0, 1]
    assert got["teacher_accuracy"][0, :4].tolist() == [0, 0, 0, 1]


def test_the_text_says_whether_it_is_exact_or_estimated():
    line = {"heldout_teacher_ce": 2.5, "heldout_teacher_known": 1.0}
    assert teacher_ce({}) is None
    assert teacher_ce(line) == "2.5000"
    assert teacher_ce({**line, "heldout_teacher_known": 0.9}) == "≈ 2.5000"
