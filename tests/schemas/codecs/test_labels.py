"""The log-probability of the text's next token: what each codec keeps, and k = 0 beside it."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decant.schemas.codecs import LABELS, Profile, Tables, decode, encode, fit, labels_field
from decant.schemas.codecs.block import Block
from decant.schemas.targets.targets import Targets
from tests.schemas.codecs.test_codecs import WHOLE, from_logits, zipf_logits


def with_labels(targets: Targets, labels: np.ndarray) -> Targets:
    return dataclasses.replace(targets, label_logprobs=labels.astype(np.float32))


@st.composite
def any_labels(draw) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = -rng.exponential(draw(st.sampled_from([0.01, 3, 1000])), size=draw(st.integers(1, 90)))
    values[rng.random(len(values)) < 0.1] = -np.inf
    values[rng.random(len(values)) < 0.1] = 0
    return values.astype(np.float32)


@settings(deadline=None, max_examples=60)
@given(any_labels())
def test_exact_labels_keep_every_bit(values):
    block = labels_field.encode(values, exact=True)
    assert labels_field.decode([block], positions=[len(values)]).tobytes() == values.tobytes()


@settings(deadline=None, max_examples=60)
@given(any_labels(), any_labels())
def test_quantised_labels_are_within_a_64th_of_a_nat_and_decode_together(first, second):
    blocks = [labels_field.encode(values, exact=False) for values in (first, second)]
    stored = labels_field.decode(blocks, positions=[len(first), len(second)])
    values = np.concatenate([first, second])
    finite = np.isfinite(values)
    np.testing.assert_array_equal(np.isfinite(stored), finite)
    assert stored.dtype == np.float32
    error = np.abs(stored[finite] - values[finite])
    assert (error <= 1 / 64).all()
    # Encoded again, as after `forget`, they stay as they are.
    again = labels_field.encode(stored[: len(first)], exact=False)
    assert again == blocks[0]


def test_a_certain_token_may_exceed_zero_by_rounding():
    block = labels_field.encode(np.array([1e-6], np.float32), exact=False)
    assert labels_field.decode([block], positions=[1]).tolist() == [0]


def test_labels_of_text_take_about_a_byte():
    rng = np.random.default_rng(0)
    values = -rng.exponential(3, size=512).astype(np.float32)
    assert len(labels_field.encode(values, exact=False).payload) < 1.2 * 512


def test_nan_is_refused_by_the_rounding_codec():
    with pytest.raises(ValueError, match="NaN"):
        labels_field.encode(np.array([np.nan], np.float32), exact=False)


@pytest.mark.parametrize("exact", [False, True])
def test_damaged_labels_are_errors(exact):
    block = labels_field.encode(-np.arange(40, dtype=np.float32), exact=exact)
    for payload in (block.payload[:-1], block.payload + b"\0", b"", b"\xff" * 12):
        with pytest.raises(ValueError, match=r"\d"):
            labels_field.decode([Block(LABELS, block.codec, payload)], positions=[40])
    with pytest.raises(ValueError, match="codec 9 of labels"):
        labels_field.decode([Block(LABELS, 9, block.payload)], positions=[40])


@pytest.mark.parametrize("profile", WHOLE)
def test_labels_stand_beside_the_head_and_change_none_of_it(profile):
    logits = zipf_logits(60, 300)
    targets = from_logits(logits, k=7)
    tables = fit(profile, from_logits(zipf_logits(280, 300, seed=9), k=7), vocabulary=300)
    labelled = with_labels(targets, np.linspace(-9, 0, 60))
    shared = {"tables": tables, "vocabulary": 300}
    plain, both = (encode(profile, some, **shared) for some in (targets, labelled))
    assert both[:-1] == plain
    stored = decode([both], positions=[60], k=7, **shared)
    assert stored.label_logprobs is not None
    np.testing.assert_allclose(stored.label_logprobs, np.linspace(-9, 0, 60), atol=1 / 64)
    assert decode([plain], positions=[60], k=7, **shared).label_logprobs is None


@pytest.mark.parametrize("profile", WHOLE)
def test_without_ids_a_record_holds_labels_or_nothing(profile: Profile):
    nothing = np.zeros((5, 0), np.int32)
    targets = Targets(nothing, nothing.astype(np.float32), nothing.astype(np.float32))
    tables = fit(profile, targets, vocabulary=300)
    assert not tables.arrays()
    for some in (targets, with_labels(targets, -np.arange(5) / 32)):
        blocks = encode(profile, some, tables=tables, vocabulary=300)
        assert {block.field for block in blocks} <= {LABELS}
        stored = decode([blocks, blocks], positions=[5, 5], k=0, vocabulary=300, tables=Tables({}))
        assert len(stored) == 10
        assert stored.ids.shape == stored.logprobs.shape == stored.tail_logmass.shape == (10, 0)
        if some.label_logprobs is None:
            assert stored.label_logprobs is None
        else:
            np.testing.assert_array_equal(stored.label_logprobs, np.tile(-np.arange(5) / 32, 2))


def test_fields_that_do_not_fit_k_are_refused():
    targets = from_logits(zipf_logits(5, 300), k=7)
    blocks = encode("lossless", targets, tables=Tables({}), vocabulary=300)
    for k, some in ((0, blocks), (7, blocks[:1])):
        with pytest.raises(ValueError, match=f"k = {k} holds fields"):
            decode([some], positions=[5], k=k, vocabulary=300, tables=Tables({}))
    with pytest.raises(ValueError, match="label"):
        encode(
            "lossless",
            with_labels(targets, np.zeros(4)),
            tables=Tables({}),
            vocabulary=300,
        )
