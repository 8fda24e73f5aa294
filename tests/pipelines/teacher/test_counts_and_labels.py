"""Counts, label log-probabilities and k = 0 on the device, compared with dense float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from decant.models.mesh.vocabulary import Vocabulary
from decant.pipelines.teacher.sharded_head import Head
from decant.pipelines.teacher.targets import LogitsSpec, TokenInputs, targets, targets_of_logits
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.draws import COUNTS_STREAM, TAIL_STREAM, uniform_starts
from tests.formulas import sampling

N, VOCABULARY = 40, 3000
LOGITS = np.random.default_rng(0).normal(size=(N, VOCABULARY)).astype(np.float32) * 4
STARTS = np.random.default_rng(1).random(N).astype(np.float32)
LABELS = np.random.default_rng(2).integers(0, VOCABULARY, N).astype(np.int32)


def numpy_targets(spec: LogitsSpec, logits: np.ndarray = LOGITS) -> dict[str, np.ndarray]:
    inputs = TokenInputs(*map(jnp.asarray, (STARTS, LABELS, STARTS)))
    here = Vocabulary(logits.shape[1])
    fields = targets_of_logits(jnp.asarray(logits), inputs, spec=spec, vocabulary=here)
    return {name: np.asarray(x) for name, x in fields.items()}


@pytest.mark.parametrize("draws", [8, 50, 64, 65, 1024])
def test_counts_are_the_ids_at_equally_spaced_points_of_the_whole_distribution(draws):
    fields = numpy_targets(LogitsSpec(counts=draws))
    p = np.exp(sampling.log_softmax(LOGITS))
    expected = sampling.ids_at(p, (np.arange(draws) + STARTS[:, None].astype(np.float64)) / draws)
    surely = ~fields["counts_near_edge"]
    assert surely.mean() > 0.95
    np.testing.assert_array_equal(fields["count_ids"][surely], expected[surely])
    assert (np.diff(fields["count_ids"], axis=1) >= 0).all(), "in the order of ids"


def test_no_id_is_counted_further_than_one_from_its_share():
    drawn = numpy_targets(LogitsSpec(counts=100))["count_ids"]
    counts = np.stack([np.bincount(ids, minlength=VOCABULARY) for ids in drawn])
    assert (counts.sum(1) == 100).all()
    assert np.abs(counts - 100 * np.exp(sampling.log_softmax(LOGITS))).max() < 1.001


@pytest.mark.parametrize("k", [0, 5, VOCABULARY])
def test_the_label_gets_its_log_probability_whatever_k_is(k):
    fields = numpy_targets(LogitsSpec(TargetSpec(k, labels=True)))
    expected = sampling.log_softmax(LOGITS)[np.arange(N), LABELS]
    np.testing.assert_allclose(fields["label_logprobs"], expected, atol=2e-5)
    assert ("ids" in fields) == (k > 0)


def test_counts_are_the_same_with_and_without_other_targets():
    alone = numpy_targets(LogitsSpec(counts=50))
    beside = numpy_targets(LogitsSpec(TargetSpec(8, 4, (1.0,), labels=True), counts=50))
    surely = ~(alone["counts_near_edge"] | beside["counts_near_edge"])
    np.testing.assert_array_equal(alone["count_ids"][surely], beside["count_ids"][surely])


@pytest.mark.parametrize("chunk", [1, 7])
def test_the_chunk_changes_no_draw_that_is_not_counted_as_near(chunk):
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(N, 16)), jnp.float32)
    unembedding = jnp.asarray(rng.normal(size=(16, VOCABULARY)), jnp.float32)
    asked = {"spec": LogitsSpec(TargetSpec(0, labels=True), 70), "head": Head(Vocabulary(3000))}
    inputs = TokenInputs(None, jnp.asarray(LABELS), jnp.asarray(STARTS))
    whole = targets(hidden, unembedding, inputs, **asked)
    cut = targets(hidden, unembedding, inputs, **asked, chunk=chunk)
    surely = ~np.asarray(whole["counts_near_edge"])
    np.testing.assert_array_equal(
        np.asarray(whole["count_ids"])[surely], np.asarray(cut["count_ids"])[surely]
    )
    np.testing.assert_allclose(whole["label_logprobs"], cut["label_logprobs"], atol=1e-5)


def test_counts_and_tail_draws_start_at_different_points():
    key = b"k" * 16
    tail, counts = (
        uniform_starts(key, positions=512, stream=name) for name in (TAIL_STREAM, COUNTS_STREAM)
    )
    assert abs(np.corrcoef(tail, counts)[0, 1]) < 0.2
