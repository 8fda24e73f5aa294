"""Every codec: what it keeps of targets, and that damaged payloads are errors."""

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decant.schemas.codecs import TAIL, TOPK, Block, Tables, decode, encode, fit
from decant.schemas.codecs.streams import compress, join, split
from decant.schemas.targets.targets import BETAS, Targets

QUANTISED = ("fast", "compact")
WHOLE = ("lossless", *QUANTISED)
FIELDS = ("ids", "logprobs", "tail_logmass")


def from_logits(logits: np.ndarray, *, k: int) -> Targets:
    """The textbook targets of dense logits, in float64."""
    n, vocabulary = logits.shape
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.lexsort((np.broadcast_to(np.arange(vocabulary), logits.shape), -logprobs))
    tail = np.take_along_axis(logprobs, ids[:, k:], 1)
    nodes = np.full((n, len(BETAS)), -np.inf)
    if k < vocabulary:
        finite = np.isfinite(tail)
        for i, beta in enumerate(BETAS):
            scaled = np.where(finite, beta * np.where(finite, tail, 0), -np.inf if beta else 0.0)
            nodes[:, i] = np.logaddexp.reduce(scaled, axis=1)
    return Targets(
        ids=ids[:, :k].astype(np.int32),
        logprobs=np.take_along_axis(logprobs, ids[:, :k], 1).astype(np.float32),
        tail_logmass=nodes.astype(np.float32),
    )


def zipf_logits(n: int, vocabulary: int, *, seed: int = 0) -> np.ndarray:
    """Logits like those of a language model: a few topics, each with its own frequent ids."""
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(5, vocabulary)) * 2 - np.log(1 + np.arange(vocabulary))
    return topics[rng.integers(5, size=n)] + rng.normal(size=(n, vocabulary))


@lru_cache
def tables_for(profile: str, vocabulary: int, k: int) -> Tables:
    """Tables of a small sample that holds no id beyond 500."""
    sample = from_logits(zipf_logits(280, min(vocabulary, 500), seed=9), k=min(k, 100))
    return fit(profile, sample, vocabulary=vocabulary)


def through(profile: str, targets: Targets, *, vocabulary: int, tables=None) -> Targets:
    tables = tables or tables_for(profile, vocabulary, targets.k)
    blocks = encode(profile, targets, tables=tables, vocabulary=vocabulary)
    return decode(
        [blocks], positions=[len(targets)], k=targets.k, vocabulary=vocabulary, tables=tables
    )


def dense(targets: Targets, beta: float) -> np.ndarray:
    """[n, k + 1] float64: probabilities at T = 1/β of the stored ids by id, then of the tail."""
    by_id = np.argsort(targets.ids, axis=1)
    head = beta * np.take_along_axis(targets.logprobs.astype(np.float64), by_id, 1)
    tail = targets.tail_logmass[:, [BETAS.index(beta)]].astype(np.float64)
    mass = np.exp(np.concatenate([head, tail], axis=1))
    return mass / mass.sum(1, keepdims=True)


def divergence(targets: Targets, stored: Targets, beta: float) -> np.ndarray:
    p, q = dense(targets, beta), dense(stored, beta)
    terms = p * (np.log(np.where(p > 0, p, 1)) - np.log(np.where(p > 0, q, 1)))
    return terms.sum(1)


def assert_same_bits(actual: Targets, expected: Targets) -> None:
    for name in FIELDS:
        mine, theirs = getattr(actual, name), getattr(expected, name)
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert mine.tobytes() == theirs.tobytes()


@st.composite
def any_targets(draw) -> tuple[Targets, int]:
    """Valid targets with ties, log 0 and gaps of tens of nats, and their vocabulary."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vocabulary = draw(st.sampled_from([1, 2, 7, 300, 5000]))
    n = draw(st.integers(0, 12))
    k = draw(st.sampled_from([1, min(3, vocabulary), min(70, vocabulary), min(300, vocabulary)]))
    logits = rng.normal(size=(n, vocabulary)) * draw(st.sampled_from([0.0, 0.1, 3.0, 40.0]))
    if draw(st.booleans()):  # ties
        logits = np.rint(logits)
    if draw(st.booleans()):  # a confident instruct model
        logits[:, 0] += 40
    if draw(st.booleans()):  # ids that cannot occur
        logits[:, 1:][rng.random((n, vocabulary - 1)) < 0.5] = -np.inf
    targets = from_logits(logits, k=k)
    if vocabulary == 5000 and draw(st.booleans()):  # ids spread over the largest vocabulary
        vocabulary = 1 << 20
        spread = np.sort(rng.choice(vocabulary, 5000, replace=False))
        nodes = targets.tail_logmass.copy()
        nodes[:, 0] = np.log(vocabulary - k)
        targets = Targets(spread[targets.ids].astype(np.int32), targets.logprobs, nodes)
    return targets, vocabulary


@pytest.mark.parametrize("profile", ["fast", "compact"])
@settings(deadline=None, max_examples=60)
@given(case=any_targets())
def test_what_was_decoded_without_normalising_is_encoded_to_the_same_bytes(profile, case):
    targets, vocabulary = case
    shared = {"vocabulary": vocabulary, "tables": tables_for(profile, vocabulary, targets.k)}
    blocks = encode(profile, targets, **shared)
    stored = decode([blocks], positions=[len(targets)], k=targets.k, normalised=False, **shared)
    assert encode(profile, stored, **shared) == blocks


@settings(deadline=None, max_examples=60)
@given(any_targets())
def test_lossless_keeps_every_bit(case):
    targets, vocabulary = case
    assert_same_bits(through("lossless", targets, vocabulary=vocabulary), targets)


@pytest.mark.parametrize("profile", QUANTISED)
@settings(deadline=None, max_examples=60)
@given(case=any_targets())
def test_quantised_codecs_keep_ids_order_and_values_within_a_step(profile, case):
    targets, vocabulary = case
    stored = through(profile, targets, vocabulary=vocabulary)
    assert [getattr(stored, name).dtype for name in FIELDS] == [np.int32, np.float32, np.float32]
    assert [getattr(stored, name).shape for name in FIELDS] == [
        getattr(targets, name).shape for name in FIELDS
    ]
    np.testing.assert_array_equal(np.sort(stored.ids, 1), np.sort(targets.ids, 1))
    falling = stored.logprobs[:, 1:] < stored.logprobs[:, :-1]
    level = stored.logprobs[:, 1:] == stored.logprobs[:, :-1]
    assert (falling | level & (stored.ids[:, 1:] > stored.ids[:, :-1])).all()
    by_id = [np.take_along_axis(t.logprobs, np.argsort(t.ids, 1), 1) for t in (targets, stored)]
    infinite = np.isinf(by_id[0])
    np.testing.assert_array_equal(np.isinf(by_id[1]), infinite)
    # Half of the largest step, 0.26 nat, plus the shift of normalising.
    assert np.abs(by_id[0][~infinite] - by_id[1][~infinite]).max(initial=0) < 0.2
    empty = np.isinf(targets.tail_logmass)
    np.testing.assert_array_equal(np.isinf(stored.tail_logmass), empty)
    error = np.abs(targets.tail_logmass[~empty] - stored.tail_logmass[~empty])
    assert error.max(initial=0) < 1 / 64 + 0.1
    np.testing.assert_array_equal(stored.tail_logmass[:, 0], targets.tail_logmass[:, 0])


@pytest.mark.parametrize("profile", QUANTISED)
@settings(deadline=None, max_examples=40)
@given(case=any_targets())
def test_decoded_head_and_tail_are_one_distribution(profile, case):
    targets, vocabulary = case
    stored = through(profile, targets, vocabulary=vocabulary)
    head = np.exp(stored.logprobs.astype(np.float64)).sum(1)
    tail = np.exp(stored.tail_logmass[:, -1].astype(np.float64))
    np.testing.assert_allclose(head + tail, 1, atol=2e-6)


@pytest.mark.parametrize("profile", QUANTISED)
@pytest.mark.parametrize("beta", [1.0, 1 / 2, 1 / 4])
def test_the_stored_distribution_is_close_at_every_temperature(profile, beta):
    sharpness = np.linspace(0.5, 4, 300)[:, None]
    targets = from_logits(zipf_logits(300, 2000) * sharpness, k=64)
    stored = through(profile, targets, vocabulary=2000)
    error = divergence(targets, stored, beta)
    assert error.mean() < 1.1e-4
    assert np.quantile(error, 0.99) < 2.5e-4
    assert error.max() < 1e-3


@pytest.mark.parametrize("profile", QUANTISED)
def test_a_gap_of_forty_nats_moves_no_other_rank(profile):
    logits = np.zeros((1, 6))
    logits[0, 3] = 40
    logits[0, 5] = 0.5
    targets = from_logits(logits, k=4)
    stored = through(profile, targets, vocabulary=6)
    np.testing.assert_array_equal(stored.ids, [[3, 5, 0, 1]])
    np.testing.assert_allclose(stored.logprobs, [[0, -39.5, -40, -40]], atol=0.14)


@pytest.mark.parametrize("profile", WHOLE)
def test_a_row_without_scored_positions_costs_nothing(profile):
    nothing = from_logits(np.zeros((0, 9)), k=3)
    assert encode(profile, nothing, tables=tables_for(profile, 9, 3), vocabulary=9) == []
    assert_same_bits(through(profile, nothing, vocabulary=9), nothing)


@pytest.mark.parametrize("profile", WHOLE)
def test_with_every_id_stored_the_tail_is_empty(profile):
    targets = from_logits(zipf_logits(20, 512), k=512)
    stored = through(profile, targets, vocabulary=512)
    assert (stored.tail_logmass == -np.inf).all()
    np.testing.assert_array_equal(np.sort(stored.ids, 1), np.tile(np.arange(512), (20, 1)))


@pytest.mark.parametrize("profile", WHOLE)
def test_the_same_targets_give_the_same_bytes(profile):
    targets = from_logits(zipf_logits(100, 800), k=16)
    first, second = (
        encode(profile, targets, tables=fit(profile, targets, vocabulary=800), vocabulary=800)
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("profile", WHOLE)
def test_tables_survive_being_stored_as_arrays(profile):
    targets = from_logits(zipf_logits(60, 800), k=16)
    tables = fit(profile, targets, vocabulary=800)
    again = Tables.from_arrays({name: np.array(a) for name, a in tables.arrays().items()})
    blocks = encode(profile, targets, tables=tables, vocabulary=800)
    shape = {"positions": [60], "k": 16, "vocabulary": 800}
    assert_same_bits(
        decode([blocks], tables=again, **shape), decode([blocks], tables=tables, **shape)
    )


def test_more_than_one_order_pays_when_positions_differ_in_kind():
    targets = from_logits(zipf_logits(1500, 1000) * 2, k=32)
    tables = fit("compact", targets, vocabulary=1000)
    assert len(tables["orders"]) > 1
    single = tables.arrays() | {"orders": np.arange(500, dtype=np.uint16)[None]}
    record = Targets(*(getattr(targets, name)[:500] for name in FIELDS))

    def size(tables):
        return len(encode("compact", record, tables=tables, vocabulary=1000)[0].payload)

    assert size(tables) < 0.9 * size(Tables.from_arrays(single))


def test_one_kind_of_position_gets_one_order():
    same = np.tile(np.linspace(5, 0, 200), (1500, 1))
    noise = np.random.default_rng(0).normal(size=same.shape)
    assert len(fit("compact", from_logits(same + noise, k=8), vocabulary=200)["orders"]) == 1


def test_an_empty_sample_still_makes_tables_that_work():
    nothing = from_logits(np.zeros((0, 50)), k=5)
    targets = from_logits(zipf_logits(30, 50), k=5)
    for profile in QUANTISED:
        stored = through(
            profile, targets, vocabulary=50, tables=fit(profile, nothing, vocabulary=50)
        )
        np.testing.assert_array_equal(np.sort(stored.ids, 1), np.sort(targets.ids, 1))


def encoded(profile: str):
    targets = from_logits(zipf_logits(40, 900), k=24)
    tables = tables_for(profile, 900, 24)
    return encode(profile, targets, tables=tables, vocabulary=900), tables


def decoded(blocks, tables):
    return decode([blocks], positions=[40], k=24, vocabulary=900, tables=tables)


def replaced(blocks, field: int, payload: bytes):
    return [Block(b.field, b.codec, payload if b.field == field else b.payload) for b in blocks]


@pytest.mark.parametrize("profile", WHOLE)
@pytest.mark.parametrize("field", [TOPK, TAIL])
def test_every_truncation_is_an_error(profile, field):
    blocks, tables = encoded(profile)
    payload = next(b.payload for b in blocks if b.field == field)
    for length in {*range(60), *range(60, len(payload), 7), len(payload) - 1}:
        with pytest.raises(ValueError, match=r"\d"):
            decoded(replaced(blocks, field, payload[:length]), tables)
    with pytest.raises(ValueError, match=r"\d"):
        decoded(replaced(blocks, field, payload + b"\0"), tables)


@pytest.mark.parametrize("profile", WHOLE)
@pytest.mark.parametrize("field", [TOPK, TAIL])
def test_altered_bytes_are_an_error_or_decode_to_something_of_the_right_shape(profile, field):
    blocks, tables = encoded(profile)
    payload = next(b.payload for b in blocks if b.field == field)
    rng = np.random.default_rng(0)
    for _ in range(200):
        altered = bytearray(payload)
        for at in rng.integers(len(altered), size=rng.integers(1, 4)):
            altered[at] = rng.integers(256)
        try:
            result = decoded(replaced(blocks, field, bytes(altered)), tables)
        except ValueError:
            continue  # the record's checksum would find this too
        assert result.ids.shape == result.logprobs.shape == (40, 24)
        assert result.ids.min() >= 0
        assert result.ids.max() < 900


def with_section(blocks, section: int, values, *, of: int, skip: int = 0):
    """The blocks with section number `section` of the top-k payload's `of` sections replaced."""
    payload = blocks[0].payload
    sections = split(payload[skip:], count=of)
    sections[section] = compress(np.asarray(values, np.uint8))
    return replaced(blocks, TOPK, payload[:skip] + join(sections))


def test_intact_streams_with_impossible_values_are_an_error():
    blocks, tables = encoded("fast")
    ranks_beyond_900 = with_section(blocks, 4, np.full(24 * 40, 255), of=5)
    with pytest.raises(ValueError, match=r"rank \d+ in a vocabulary of 900"):
        decoded(ranks_beyond_900, tables)
    rising_by_254 = with_section(blocks, 2, np.full(20 * 40, 254), of=5)
    with pytest.raises(ValueError, match="a level of log-probability"):
        decoded(rising_by_254, tables)
    # An escape of four bytes for each node: 2^31 units of 1/32 nat.
    nodes = join([b"\xff" * 4 * 240, *[compress(np.full(40, 255, np.uint8))] * 6])
    with pytest.raises(ValueError, match="tail log-mass outside"):
        decoded(replaced(blocks, TAIL, nodes), tables)

    blocks, tables = encoded("compact")
    for groups in (b"\0", b"\4"):
        with pytest.raises(ValueError, match="groups of positions"):
            decoded(replaced(blocks, TOPK, groups + blocks[0].payload[1:]), tables)
    above_the_last = with_section(blocks, 6, np.full(6 * 40, 254), of=18, skip=1)
    with pytest.raises(ValueError, match="a level of log-probability"):
        decoded(above_the_last, tables)
    # One group of positions: 6 sections, 4 frames of levels, 8 of symbols for 3 columns each.
    orders_beyond_the_last = with_section(blocks, 0, np.full(40, 255), of=18, skip=1)
    with pytest.raises(ValueError, match="an order, a group or a level"):
        decoded(orders_beyond_the_last, tables)
    symbols_of_no_gap = with_section(blocks, 10, np.full(3 * 40, 255), of=18, skip=1)
    with pytest.raises(ValueError, match="symbol 255"):
        decoded(symbols_of_no_gap, tables)
    # 24 gaps of at least 64 each, symbol 24 with 5 raw bits, pass the last place of 900 + 500.
    far = blocks
    for frame in range(10, 18):
        far = with_section(far, frame, np.full(3 * 40, 24), of=18, skip=1)
    sections = split(far[0].payload[1:], count=18)
    sections[5] = bytes(24 * 40 * 5 // 8)
    with pytest.raises(ValueError, match="a place is outside"):
        decoded(replaced(far, TOPK, far[0].payload[:1] + join(sections)), tables)


@pytest.mark.parametrize("profile", WHOLE)
@pytest.mark.parametrize("change", [{"positions": [41]}, {"positions": [39]}, {"k": 23}, {"k": 25}])
def test_a_record_of_another_shape_is_an_error(profile, change):
    blocks, tables = encoded(profile)
    shape = {"positions": [40], "k": 24, "vocabulary": 900} | change
    with pytest.raises(ValueError, match=r"\d"):
        decode([blocks], tables=tables, **shape)


@pytest.mark.parametrize("profile", WHOLE)
def test_a_missing_field_or_an_unknown_codec_is_an_error(profile):
    blocks, tables = encoded(profile)
    with pytest.raises(ValueError, match="fields"):
        decoded(blocks[:1], tables)
    with pytest.raises(ValueError, match="newer version"):
        decoded([Block(TOPK, 99, b""), blocks[1]], tables)


@pytest.mark.parametrize("profile", QUANTISED)
def test_nan_is_refused(profile):
    targets = from_logits(zipf_logits(5, 50), k=4)
    for name in ("logprobs", "tail_logmass"):
        broken = {field: getattr(targets, field).copy() for field in FIELDS}
        broken[name][2, 1] = np.nan
        with pytest.raises(ValueError, match="NaN"):
            through(profile, Targets(**broken), vocabulary=50)


def test_ids_outside_the_vocabulary_or_twice_in_one_set_are_refused():
    targets = from_logits(zipf_logits(5, 50), k=4)
    with pytest.raises(ValueError, match="vocabulary of 10"):
        through("fast", targets, vocabulary=10)
    twice = targets.ids.copy()
    twice[1, 1] = twice[1, 0]
    with pytest.raises(ValueError, match="twice"):
        through("compact", Targets(twice, targets.logprobs, targets.tail_logmass), vocabulary=50)


def test_tables_of_another_profile_are_refused():
    targets = from_logits(zipf_logits(5, 50), k=4)
    with pytest.raises(ValueError, match="tables of another profile"):
        through("compact", targets, vocabulary=50, tables=tables_for("fast", 50, 4))
