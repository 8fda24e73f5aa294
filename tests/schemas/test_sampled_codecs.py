"""What the codecs keep of tail draws and of threshold samples, and what they make of damage."""

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.codecs import DRAWS, TOPK, Block, Profile, Tables, decode, encode, fit
from schemas.draws import Draws, logweights
from schemas.targets import BETAS, Targets, joined
from tests import sampling
from tests.schemas.test_codecs import replaced, zipf_logits

DRAWN: tuple[Profile, ...] = ("lossless", "fast", "compact")
ALL: tuple[Profile, ...] = (*DRAWN, "threshold")


def example(profile: Profile, n: int, vocabulary: int, *, seed: int = 0) -> Targets:
    rng = np.random.default_rng(seed)
    logits = zipf_logits(n, vocabulary, seed=seed)
    if profile == "threshold":
        return sampling.threshold_sample(logits, rng.random(n), c=0.02)
    return sampling.with_draws(logits, rng.random(n), k=8, m=12, betas=(0.5, 1.0))


@lru_cache
def tables_for(profile: Profile, vocabulary: int) -> Tables:
    return fit(profile, example(profile, 280, vocabulary, seed=9), vocabulary=vocabulary)


def through(profile: Profile, targets: Targets, *, vocabulary: int) -> Targets:
    tables = tables_for(profile, vocabulary)
    blocks = encode(profile, targets, tables=tables, vocabulary=vocabulary)
    return decode(blocks, positions=len(targets), k=targets.k, vocabulary=vocabulary, tables=tables)


def sets(ids: np.ndarray, there: np.ndarray) -> list[list[int]]:
    return [sorted(i[t].tolist()) for i, t in zip(ids, there, strict=True)]


def test_lossless_keeps_draws_as_they_were_drawn():
    targets = example("lossless", 50, 700)
    stored = through("lossless", targets, vocabulary=700)
    np.testing.assert_array_equal(stored.draws.ids, targets.draws.ids)
    np.testing.assert_array_equal(stored.draws.logprobs, targets.draws.logprobs)
    assert stored.draws.betas == (0.5, 1.0)


@pytest.mark.parametrize("profile", ["fast", "compact"])
def test_quantised_draws_keep_their_ids_and_round_their_values(profile):
    targets = example(profile, 50, 700)
    stored = through(profile, targets, vocabulary=700)
    everywhere = np.ones(targets.draws.ids.shape, bool)
    assert sets(stored.draws.ids, everywhere) == sets(targets.draws.ids, everywhere)
    of_id = np.zeros((50, 700))
    rows = np.arange(50)[:, None]
    of_id[rows, targets.draws.ids] = targets.draws.logprobs
    error = stored.draws.logprobs - of_id[rows, stored.draws.ids]
    assert np.abs(error).max() < 1 / 32 + 0.02  # half a level, and what normalising moves
    assert abs(error.mean()) < 0.005
    assert stored.draws.betas == (0.5, 1.0)


@pytest.mark.parametrize("profile", DRAWN)
def test_the_stored_weights_of_all_draws_sum_to_the_tail(profile):
    """Σ p/(m·r) over the draws estimates the tail's mass: on average over positions, through
    the rounding of the codec."""
    targets = example(profile, 2000, 300, seed=4)
    stored = through(profile, targets, vocabulary=300)
    for draws, mass in ((targets.draws, targets.tail_logmass), (stored.draws, stored.tail_logmass)):
        weights = np.exp(draws.logprobs + logweights(draws, mass, nodes=BETAS)).sum(1)
        np.testing.assert_allclose(weights.mean(), np.exp(mass[:, -1]).mean(), rtol=0.01)


@st.composite
def any_logits(draw) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, vocabulary = draw(st.integers(1, 9)), 700
    logits = rng.normal(size=(n, vocabulary)) * draw(st.sampled_from([0.0, 0.1, 3.0, 30.0]))
    if draw(st.booleans()):
        logits = np.rint(logits)
    if draw(st.booleans()):
        logits[:, 3] += 60  # sure of itself: nothing to draw from
    return logits, rng.random(n)


@settings(deadline=None, max_examples=60)
@given(case=any_logits())
def test_threshold_samples_keep_every_id_and_what_it_stands_for(case):
    logits, starts = case
    targets = sampling.threshold_sample(logits, starts, c=0.02)
    stored = through("threshold", targets, vocabulary=700)
    kept, drawn = np.isfinite(targets.logprobs), np.isfinite(targets.draws.logprobs)
    assert sets(stored.ids, np.isfinite(stored.logprobs)) == sets(targets.ids, kept)
    assert sets(stored.draws.ids, np.isfinite(stored.draws.logprobs)) == sets(
        targets.draws.ids, drawn
    )
    assert (np.diff(np.where(np.isfinite(stored.logprobs), stored.logprobs, -99)) <= 0).all()
    there = np.isfinite(stored.draws.logprobs)
    np.testing.assert_allclose(stored.draws.logprobs[there], np.log(0.02), rtol=1e-6)
    by_id = [
        np.take_along_axis(t.logprobs, np.argsort(np.where(t.logprobs > -99, t.ids, 999), 1), 1)
        for t in (targets, stored)
    ]
    finite = np.isfinite(by_id[0])
    assert np.abs(np.exp(by_id[0][finite]) - np.exp(by_id[1][finite])).max(initial=0) < 0.06
    total = np.exp(stored.logprobs).sum(1) + np.exp(stored.tail_logmass[:, 0])
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert stored.ids.shape == targets.ids.shape
    assert stored.draws.ids.shape == targets.draws.ids.shape


@pytest.mark.parametrize("vocabulary", [60, 1 << 20])
def test_ids_that_no_table_names_survive(vocabulary):
    ids = np.array([[vocabulary - 1, 5]], np.int32)
    targets = Targets(
        ids,
        np.log(np.array([[0.5, 0.3]], np.float32)),
        np.log(np.array([[0.2]], np.float32)),
        Draws(np.array([[vocabulary - 2, 0, 0]], np.int32), np.array([[-2, -np.inf, -np.inf]]), ()),
    )
    stored = through_tables_of_60(targets, vocabulary)
    np.testing.assert_array_equal(stored.ids, ids)
    np.testing.assert_array_equal(stored.draws.ids, [[vocabulary - 2, 0, 0]])


def through_tables_of_60(targets: Targets, vocabulary: int) -> Targets:
    tables = tables_for("threshold", 60)
    blocks = encode("threshold", targets, tables=tables, vocabulary=vocabulary)
    return decode(blocks, positions=1, k=2, vocabulary=vocabulary, tables=tables)


def test_a_threshold_sample_is_smaller_than_its_ids_written_out():
    targets = example("threshold", 1000, 700)
    blocks = encode("threshold", targets, tables=tables_for("threshold", 700), vocabulary=700)
    entries = np.isfinite(targets.logprobs).sum() + np.isfinite(targets.draws.logprobs).sum()
    assert len(blocks[0].payload) < 1.5 * entries


@pytest.mark.parametrize("profile", ALL)
def test_every_truncation_of_draws_is_an_error(profile):
    blocks, tables, field = encoded(profile)
    payload = next(b.payload for b in blocks if b.field == field)
    for length in {*range(40), *range(40, len(payload), 7), len(payload) - 1}:
        with pytest.raises(ValueError, match=r"\d"):
            decoded(replaced(blocks, field, payload[:length]), tables)


@pytest.mark.parametrize("profile", ALL)
def test_altered_draws_are_an_error_or_ids_of_the_vocabulary(profile):
    blocks, tables, field = encoded(profile)
    payload = next(b.payload for b in blocks if b.field == field)
    rng = np.random.default_rng(0)
    for _ in range(300):
        altered = bytearray(payload)
        for at in rng.integers(len(altered), size=rng.integers(1, 4)):
            altered[at] = rng.integers(256)
        try:
            result = decoded(replaced(blocks, field, bytes(altered)), tables)
        except ValueError:
            continue  # what the record's checksum would have said anyway
        for ids in (result.ids, result.draws.ids):
            assert 0 <= ids.min() <= ids.max() < 700
            assert len(ids) == 40


def encoded(profile: Profile) -> tuple[list[Block], Tables, int]:
    tables = tables_for(profile, 700)
    blocks = encode(profile, example(profile, 40, 700), tables=tables, vocabulary=700)
    return blocks, tables, TOPK if profile == "threshold" else DRAWS


def decoded(blocks: list[Block], tables: Tables) -> Targets:
    k = 50 if blocks[0].codec == 4 else 8
    return decode(blocks, positions=40, k=k, vocabulary=700, tables=tables)


def test_draws_of_another_profile_in_a_record_are_refused():
    quantised, tables, _ = encoded("compact")
    exact, _, _ = encoded("lossless")
    with pytest.raises(ValueError, match="newer version"):
        decoded([*quantised[:2], exact[2]], tables)


@pytest.mark.parametrize("profile", ALL)
def test_the_same_draws_give_the_same_bytes(profile):
    first, second = (encoded(profile)[0] for _ in range(2))
    assert first == second


def test_joined_parts_keep_their_draws():
    targets = example("compact", 30, 100)
    again = joined([targets[:10], targets[10:]])
    np.testing.assert_array_equal(again.draws.ids, targets.draws.ids)
    assert again.draws.betas == targets.draws.betas
