"""Codecs of tail draws: what they keep, and that damaged payloads are errors."""

from functools import lru_cache

import numpy as np
import pytest

from decant.schemas.codecs import DRAWS, Block, Profile, Tables, decode, encode, fit
from decant.schemas.codecs.streams import compress, join, split
from decant.schemas.targets.draws import logweights
from decant.schemas.targets.targets import BETAS, Targets, join_targets
from tests.formulas import sampling
from tests.schemas.codecs.test_codecs import replaced, zipf_logits

PROFILES: tuple[Profile, ...] = ("lossless", "fast", "compact")


def example(profile: Profile, n: int, vocabulary: int, *, seed: int = 0) -> Targets:
    rng = np.random.default_rng(seed)
    logits = zipf_logits(n, vocabulary, seed=seed)
    return sampling.with_draws(logits, rng.random(n), k=8, m=12, betas=(0.5, 1.0))


@lru_cache
def tables_for(profile: Profile, vocabulary: int) -> Tables:
    return fit(profile, example(profile, 280, vocabulary, seed=9), vocabulary=vocabulary)


def through(profile: Profile, targets: Targets, *, vocabulary: int) -> Targets:
    tables = tables_for(profile, vocabulary)
    blocks = encode(profile, targets, tables=tables, vocabulary=vocabulary)
    return decode(
        [blocks], positions=[len(targets)], k=targets.k, vocabulary=vocabulary, tables=tables
    )


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
    assert np.abs(error).max() < 1 / 16 + 0.02  # half a level, plus the shift of normalising
    assert abs(error.mean()) < 0.005
    assert stored.draws.betas == (0.5, 1.0)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_stored_weights_of_all_draws_sum_to_the_tail(profile):
    """The mean of Σ p/(m·r) over positions is the mean of the tail's mass, despite rounding."""
    targets = example(profile, 2000, 300, seed=4)
    stored = through(profile, targets, vocabulary=300)
    for draws, mass in ((targets.draws, targets.tail_logmass), (stored.draws, stored.tail_logmass)):
        weights = np.exp(draws.logprobs + logweights(draws, mass, nodes=BETAS)).sum(1)
        np.testing.assert_allclose(weights.mean(), np.exp(mass[:, -1]).mean(), rtol=0.01)


@pytest.mark.parametrize("betas", [(1.0,), (0.5, 1.0), (0.25, 0.5, 1.0)])
def test_weights_are_one_over_m_times_the_proposal(betas):
    rng = np.random.default_rng(0)
    logits = zipf_logits(40, 300) * np.linspace(0.1, 6, 40)[:, None]
    targets = sampling.with_draws(logits, rng.random(40), k=8, m=12, betas=betas)
    assert targets.draws
    targets.draws.logprobs[3, 5:] = -np.inf  # no draw there
    computed = logweights(targets.draws, targets.tail_logmass, nodes=BETAS)
    r = np.take_along_axis(sampling.proposal(logits, k=8, betas=betas), targets.draws.ids, 1)
    expected = -np.log(12 * r)
    expected[3, 5:] = -np.inf
    # The tolerance is float32 rounding of the log-probabilities and of the tail's mass.
    np.testing.assert_allclose(computed, expected, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_truncation_of_draws_is_an_error(profile):
    blocks, tables = encoded(profile)
    payload = next(b.payload for b in blocks if b.field == DRAWS)
    for length in {*range(40), *range(40, len(payload), 7), len(payload) - 1}:
        with pytest.raises(ValueError, match=r"\d"):
            decoded(replaced(blocks, DRAWS, payload[:length]), tables)


@pytest.mark.parametrize("profile", PROFILES)
def test_altered_draws_are_an_error_or_ids_of_the_vocabulary(profile):
    blocks, tables = encoded(profile)
    payload = next(b.payload for b in blocks if b.field == DRAWS)
    rng = np.random.default_rng(0)
    for _ in range(300):
        altered = bytearray(payload)
        for at in rng.integers(len(altered), size=rng.integers(1, 4)):
            altered[at] = rng.integers(256)
        try:
            result = decoded(replaced(blocks, DRAWS, bytes(altered)), tables)
        except ValueError:
            continue  # the record's checksum would find this too
        for ids in (result.ids, result.draws.ids):
            assert 0 <= ids.min() <= ids.max() < 700
            assert len(ids) == 40


def test_ranks_beyond_the_vocabulary_are_an_error():
    blocks, tables = encoded("compact")
    payload = blocks[2].payload
    _, escapes, levels, _ = split(payload, start=3, count=4)
    # 12 distances of at least 64 each, symbol 24 with 5 raw bits, pass rank 700.
    symbols = compress(np.full(12 * 40, 24, np.uint8))
    far = payload[:3] + join([bytes(12 * 40 * 5 // 8), escapes, levels, symbols])
    with pytest.raises(ValueError, match="the rank of a draw"):
        decoded(replaced(blocks, DRAWS, far), tables)


def encoded(profile: Profile) -> tuple[list[Block], Tables]:
    tables = tables_for(profile, 700)
    blocks = encode(profile, example(profile, 40, 700), tables=tables, vocabulary=700)
    return blocks, tables


def decoded(blocks: list[Block], tables: Tables) -> Targets:
    return decode([blocks], positions=[40], k=8, vocabulary=700, tables=tables)


def test_draws_of_another_profile_in_a_record_are_refused():
    quantised, tables = encoded("compact")
    exact, _ = encoded("lossless")
    with pytest.raises(ValueError, match="newer version"):
        decoded([*quantised[:2], exact[2]], tables)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_same_draws_give_the_same_bytes(profile):
    first, second = (encoded(profile)[0] for _ in range(2))
    assert first == second


def test_joined_parts_keep_their_draws():
    targets = example("compact", 30, 100)
    again = join_targets([targets[:10], targets[10:]])
    np.testing.assert_array_equal(again.draws.ids, targets.draws.ids)
    assert again.draws.betas == targets.draws.betas
