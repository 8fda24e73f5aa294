"""Matched targets as read: partners as the top-k, all others in the tail and apart."""

import numpy as np

from decant.schemas.targets.unmatched import UNMATCHED, split_unmatched
from tests.formulas import by_rank, dense
from tests.making.heads import head_inputs

SIZE, THEIRS, K = 12, 16, 6


def stored(teacher, partner, mask):
    """Top-k as the manifest's `unmatched` says: ids from SIZE on have no partner."""
    ids, logprobs, masses = dense.targets(teacher, K)
    own = partner[ids]
    slots = np.broadcast_to(np.arange(K), ids.shape)
    there = mask[..., None]
    return {
        "topk_ids": np.where(there, np.where(own >= 0, own, SIZE + slots), 0).astype(np.int32),
        "topk_logprobs": np.where(there, logprobs, -np.inf),
        "tail_logmass": np.where(there, masses, -np.inf),
    }


def test_partners_are_the_top_k_and_all_others_are_tail():
    rng = np.random.default_rng(0)
    _, _, _, targets = head_inputs(k=2, vocabulary=SIZE, batch=2, length=5)
    teacher = rng.normal(size=(2, 5, THEIRS)) * 2
    partner = np.append(rng.permutation(SIZE)[:8], np.full(8, -1))
    got = split_unmatched(stored(teacher, partner, targets.mask), vocabulary=SIZE)
    expected = by_rank.split_targets(targets, teacher, k=K, partner=partner)
    np.testing.assert_array_equal(got["topk_ids"], expected.topk_ids)
    np.testing.assert_allclose(got["topk_logprobs"], expected.topk_logprobs, rtol=1e-6)
    np.testing.assert_allclose(got[UNMATCHED], expected.unmatched, rtol=1e-6)
    np.testing.assert_allclose(got["tail_logmass"], expected.tail_logmass, rtol=2e-6, atol=2e-6)
    assert {name: x.dtype for name, x in got.items()} == {
        "topk_ids": np.int32,
        **dict.fromkeys(("topk_logprobs", "tail_logmass", UNMATCHED), np.float32),
    }
