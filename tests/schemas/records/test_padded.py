"""Padded targets: every number of the arrays is overwritten."""

import dataclasses

import numpy as np
import pytest

from decant.schemas.records.padded import allocate_targets, clear_targets, fill_targets
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.draws import Draws
from decant.schemas.targets.targets import BETAS, Targets

IDS = ("topk_ids", "tail_ids")


def garbage(*, k: int, draws: int) -> dict[str, np.ndarray]:
    out = allocate_targets(2, length=3, spec=TargetSpec(k, draws))
    for array in out.values():
        array[...] = 7
    return out


def two_positions(*, k: int, m: int) -> Targets:
    mass = np.zeros((2, len(BETAS)), np.float32)
    draws = Draws(np.full((2, m), 5, np.int32), np.full((2, m), -2, np.float32), (1.0,))
    ids = np.arange(2 * k, dtype=np.int32).reshape(2, k)
    return Targets(ids, -ids.astype(np.float32), mass, draws if m else None)


def test_positions_without_a_target_hold_id_0_and_log_0():
    out = garbage(k=2, draws=2)
    fill_targets(out, np.array([1, 5]), targets=two_positions(k=2, m=2), nodes=BETAS)
    clear_targets(out, np.array([0, 2, 3, 4]))
    for name, array in out.items():
        assert (array[:, 0] == (0 if name in IDS else -np.inf)).all()
    assert out["topk_ids"].tolist() == [[[0, 0], [0, 1], [0, 0]], [[0, 0], [0, 0], [2, 3]]]
    assert out["topk_logprobs"][1, 2].tolist() == [-2, -3]
    assert (out["tail_logmass"][[0, 1], [1, 2]] == 0).all()
    assert out["tail_ids"][0].tolist() == [[0, 0], [5, 5], [0, 0]]
    # r = exp(logp − A(1)) = exp(−2 − 0), so −log(m·r) = 2 − log 2.
    np.testing.assert_allclose(out["tail_logweights"][1, 2], 2 - np.log(2), rtol=1e-6)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_targets_land_at_their_positions_in_long_runs_and_in_short_ones(share):
    scored = np.random.default_rng(0).random(600) < share
    n = int(scored.sum())
    ids = np.arange(1, 2 * n + 1, dtype=np.int32).reshape(n, 2)
    targets = Targets(ids, -ids.astype(np.float32), np.zeros((n, len(BETAS)), np.float32))
    out = allocate_targets(3, length=200, spec=TargetSpec(2))
    for array in out.values():
        array[...] = 0
    fill_targets(out, np.flatnonzero(scored), targets=targets, nodes=BETAS)
    expected = np.zeros((600, 2), np.int32)
    for position, topk in zip(np.flatnonzero(scored), ids, strict=True):
        expected[position] = topk
    np.testing.assert_array_equal(out["topk_ids"].reshape(600, 2), expected)
    np.testing.assert_array_equal(out["topk_logprobs"], -out["topk_ids"])


def test_a_part_with_fewer_ids_and_no_draws_is_padded():
    out = garbage(k=3, draws=2)
    fill_targets(out, np.arange(6)[:2], targets=two_positions(k=1, m=0), nodes=BETAS)
    clear_targets(out, np.arange(2, 6))
    assert out["topk_ids"][0].tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    np.testing.assert_array_equal(out["topk_logprobs"][0, 1], [-1, -np.inf, -np.inf])
    for name in ("tail_ids", "tail_logprobs", "tail_logweights"):
        assert (out[name] == (0 if name in IDS else -np.inf)).all()


def test_labels_are_one_number_a_position_and_log_0_where_a_part_has_none():
    out = allocate_targets(2, length=3, spec=TargetSpec(2, labels=True))
    assert out["label_logprobs"].shape == (2, 3)
    out["label_logprobs"][...] = 7
    labelled = dataclasses.replace(
        two_positions(k=2, m=0), label_logprobs=np.array([-1, -2], np.float32)
    )
    fill_targets(out, np.array([1, 2]), targets=labelled, nodes=BETAS)
    fill_targets(out, np.array([3, 5]), targets=two_positions(k=2, m=0), nodes=BETAS)
    clear_targets(out, np.array([0, 4]))
    np.testing.assert_array_equal(
        out["label_logprobs"], [[-np.inf, -1, -2], [-np.inf, -np.inf, -np.inf]]
    )


def test_without_ids_the_arrays_of_ids_and_of_the_tail_have_width_0():
    out = allocate_targets(2, length=3, spec=TargetSpec(0, labels=True))
    assert {name: array.shape for name, array in out.items()} == {
        "topk_ids": (2, 3, 0),
        "topk_logprobs": (2, 3, 0),
        "tail_logmass": (2, 3, 0),
        "label_logprobs": (2, 3),
    }
    nothing = np.zeros((1, 0), np.float32)
    labels = np.array([-4], np.float32)
    targets = Targets(nothing.astype(np.int32), nothing, nothing, label_logprobs=labels)
    fill_targets(out, np.array([4]), targets=targets, nodes=BETAS)
    clear_targets(out, np.array([0, 1, 2, 3, 5]))
    assert out["label_logprobs"][1, 1] == -4
