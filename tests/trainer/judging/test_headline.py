"""Which estimate of the KL is the headline, and that all of its readers show the same one."""

import dataclasses
import shutil

import numpy as np
import pytest

from decant.schemas import Cache
from decant.schemas.manifest.manifest import read_manifest
from decant.trainer.config import Keep
from decant.trainer.judging.headline import (
    BOUND,
    DENSE,
    DRAWS,
    PRIOR,
    common_estimate,
    estimate_of,
    with_headline,
)
from decant.trainer.judging.standard_error import paired_difference, standard_error
from decant.trainer.run.checkpoint import Checkpoints
from decant.trainer.run.metrics_log import read_metrics
from tests.trainer.run.test_checkpoint import state_at


def without(cache: Cache, path, *, draws: bool = False, prior: bool = False) -> Cache:
    """A copy of a cache whose second part, equal to the first, says it has no draws or prior."""
    shutil.copytree(cache.path, path)
    shutil.copytree(path / "parts" / "0000", path / "parts" / "0001")
    manifest = read_manifest(path)
    (part,) = manifest.parts
    second = dataclasses.replace(part, path="parts/0001")
    if draws:
        logits = dataclasses.replace(part.logits, draws=0)
        second = dataclasses.replace(second, signals={**part.signals, "logits": logits})
    if prior:
        kept = {n: s for n, s in part.statistics.items() if not n.startswith("tail-prior")}
        second = dataclasses.replace(second, statistics=kept)
    manifest = dataclasses.replace(manifest, parts=(part, second))
    return Cache(path, manifest)


def test_the_best_estimate_that_the_cache_allows_is_the_headline(cache, drawn_cache, whole_cache):
    assert estimate_of(whole_cache) is DENSE
    assert estimate_of(drawn_cache) is DRAWS
    assert estimate_of(cache) is PRIOR


def test_an_estimate_that_some_positions_lack_is_not_the_headline(drawn_cache, tmp_path):
    assert estimate_of(without(drawn_cache, tmp_path / "a")) is DRAWS
    assert estimate_of(without(drawn_cache, tmp_path / "b", draws=True)) is PRIOR
    assert estimate_of(without(drawn_cache, tmp_path / "c", draws=True, prior=True)) is BOUND


def test_runs_are_compared_by_an_estimate_that_all_have():
    old, new = {"heldout_kl_bound": 2.0}, {"heldout_kl_bound": 3.0, "heldout_kl_unbiased": 1.0}
    assert common_estimate([new, new]) is DRAWS
    assert common_estimate([new, old]) is BOUND
    assert with_headline(new, DRAWS)["heldout_kl"] == 1.0
    assert with_headline(new, DRAWS)["heldout_kl_by"] == "draws"


def test_checkpoints_of_release_0_8_are_compared_by_what_it_recorded(tmp_path):
    """By draws 20 and 30 would beat 10, whose draws nobody knows; by the bound only 30 does."""
    judged = {
        10: {"heldout_kl_bound": 0.5, "heldout_ce": 1.0},
        20: {"heldout_kl_bound": 0.6, "heldout_kl_unbiased": 0.3, "heldout_ce": 1.0},
        30: {"heldout_kl_bound": 0.4, "heldout_kl_unbiased": 0.35, "heldout_ce": 1.0},
    }
    checkpoints = Checkpoints(tmp_path, keep=Keep(best=1, last=2))
    checkpoints.save(state_at(10), data={}, heldout=judged[10])
    assert not checkpoints.due(20, heldout=judged[20])
    assert checkpoints.due(30, heldout=judged[30])
    checkpoints.save(state_at(20), data={}, heldout=judged[20])
    assert checkpoints.named_step("best") == 10
    checkpoints.save(state_at(30), data={}, heldout=judged[30])
    checkpoints.close()
    # 10 was deleted. The two that are left are compared by draws, which both recorded.
    again = Checkpoints(tmp_path, keep=Keep(best=1, last=2))
    assert (again.steps, again.named_step("best")) == ([20, 30], 20)
    again.close()


def test_a_line_of_training_holds_the_headline_and_the_bound(noisy_run):
    for line in read_metrics(noisy_run.run):
        if "heldout_ce" in line:
            assert line["heldout_kl_by"] == "draws"
            assert line["heldout_kl"] == line["heldout_kl_unbiased"]
            assert 0.8 < line["heldout_kl"] / line["heldout_kl_bound"] < 5
            assert line["heldout_kl"] != line["heldout_kl_bound"]


def test_a_standard_error_of_rows_of_equal_length_is_that_of_their_means():
    means = np.array([1.0, 2.0, 4.0, 3.0])
    expected = means.std(ddof=1) / np.sqrt(len(means))
    assert standard_error((7 * means).tolist(), [7] * 4) == pytest.approx(expected)
    # Rows without a position, such as those that fill up a batch, are no evidence.
    assert standard_error([*(7 * means), 0.0], [7] * 4 + [0]) == pytest.approx(expected)
    assert standard_error([3.0], [7]) is None


def test_a_difference_row_by_row_is_not_blurred_by_how_hard_rows_are():
    hard = np.array([1.0, 50.0, 9.0])
    same = {"cache_id": "c", "heldout_kl_by": "draws"}
    a = {**same, "kl_by_row": {"sums": (hard + 2.0).tolist(), "tokens": [10] * 3}}
    b = {**same, "kl_by_row": {"sums": hard.tolist(), "tokens": [10] * 3}}
    by = a["heldout_kl_by"]
    assert paired_difference(a, b, by=by) == pytest.approx((0.2, 0.0))
    assert paired_difference(a, {**b, "cache_id": "other"}, by=by) is None
    assert paired_difference(a, {}, by=by) is None
    assert paired_difference(a, b, by="bound") is None, "another estimate is shown beside it"
