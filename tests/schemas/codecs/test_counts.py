"""The codec of counts keeps ids and counts exactly, and refuses damaged payloads."""

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decant.schemas.codecs import Block, Tables, counts_field, head_counts
from decant.schemas.codecs.block import COUNTS
from decant.schemas.codecs.check_tables import require_tables
from decant.schemas.targets.counts import Counts, count_draws
from decant.schemas.targets.targets import BETAS, Targets
from tests.schemas.codecs.test_codecs import zipf_logits


def drawn(logits: np.ndarray, *, draws: int, k: int, seed: int = 0) -> tuple[Counts, Targets]:
    """Equally spaced draws of the softmax of `logits`, and its k likeliest ids."""
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    start = np.random.default_rng(seed).random((len(p), 1))
    edges = np.cumsum(p, axis=1)
    edges[:, -1] = 1.0
    points = (np.arange(draws) + start) / draws
    ids = [np.searchsorted(edge, at, side="right") for edge, at in zip(edges, points, strict=True)]
    top = np.argsort(-p, axis=1, kind="stable")[:, :k].astype(np.int32)
    with np.errstate(divide="ignore"):
        logprobs = np.log(np.take_along_axis(p, top, 1)).astype(np.float32)
    ids = np.array(ids, np.int32).reshape(len(p), draws)
    return count_draws(ids), head_of(top, logprobs)


def head_of(ids: np.ndarray, logprobs: np.ndarray) -> Targets:
    return Targets(ids, logprobs, np.zeros((len(ids), len(BETAS)), np.float32))


@lru_cache
def tables_for(vocabulary: int, k: int) -> Tables:
    """Tables of a small sample, of which no id lies beyond 500."""
    logits = zipf_logits(200, min(vocabulary, 500), seed=9)
    counts, head = drawn(logits, draws=20, k=min(k, vocabulary))
    return counts_field.fit(counts, head=head, vocabulary=vocabulary)


def through(
    counts: Counts, head: Targets, *, vocabulary: int, read: Targets | None = None, cut: int = 0
) -> Counts:
    """Encoded in two records, of which the first has `cut` positions, and decoded together.

    `read` is the head as another machine decodes it.
    """
    tables = tables_for(vocabulary, head.k)
    parts = [slice(a, b) for a, b in ((0, cut), (cut, len(counts))) if a < b]
    blocks = [
        counts_field.encode(counts[at], head=head[at], tables=tables, vocabulary=vocabulary)
        for at in parts
    ]
    return counts_field.decode(
        blocks,
        positions=[at.stop - at.start for at in parts],
        draws=counts.draws,
        head=read or head,
        tables=tables,
        vocabulary=vocabulary,
    )


def require_same(got: Counts, expected: Counts) -> None:
    width = int((expected.counts > 0).sum(1).max())
    for name in ("ids", "counts"):
        array = getattr(got, name)
        assert array.dtype == np.int32
        np.testing.assert_array_equal(array, getattr(expected, name)[:, :width])
    assert got.draws == expected.draws


@st.composite
def any_counts(draw) -> tuple[Counts, Targets, int]:
    """Counts of flat, peaked and degenerate distributions, and a head that fits them or not."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vocabulary = draw(st.sampled_from([1, 2, 7, 300, 5000]))
    n = draw(st.integers(1, 12))
    k = draw(st.sampled_from([0, 1, min(8, vocabulary), min(300, vocabulary)]))
    logits = rng.normal(size=(n, vocabulary)) * draw(st.sampled_from([0.0, 0.1, 3.0, 40.0]))
    counts, head = drawn(logits, draws=draw(st.sampled_from([1, 8, 50, 1024])), k=k)
    if k and draw(st.booleans()):  # positions of an adaptive head hold fewer ids
        keep = np.arange(k) < rng.integers(k + 1, size=(n, 1))
        ids, logprobs = np.where(keep, head.ids, 0), np.where(keep, head.logprobs, -np.inf)
        head = head_of(ids.astype(np.int32), logprobs.astype(np.float32))
    if draw(st.booleans()):  # a head whose probabilities are wrong
        noise = rng.normal(size=head.logprobs.shape) * draw(st.sampled_from([0.02, 3.0]))
        logprobs = np.minimum(head.logprobs + noise.astype(np.float32), 0)
        head = head_of(head.ids, logprobs)
    return counts, head, vocabulary


@settings(deadline=None, max_examples=100)
@given(any_counts(), st.integers(0, 12))
def test_ids_and_counts_are_exact(case, cut):
    counts, head, vocabulary = case
    cut = min(cut, len(counts) - 1)
    require_same(through(counts, head, vocabulary=vocabulary, cut=cut), counts)


@pytest.mark.parametrize("draws", [20, 1024])
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), ulps=st.integers(-2, 2))
def test_a_machine_with_other_last_bits_reads_the_same(draws, seed, ulps):
    rng = np.random.default_rng(seed)
    counts, head = drawn(zipf_logits(40, 300, seed=seed % 1000), draws=draws, k=8)
    # Most of these lie on the edge of a step: N·p is a multiple of 1/32 in exact numbers.
    edges = np.log(rng.integers(1, 32 * draws, size=head.ids.shape) / (32 * draws))
    head = head_of(head.ids, edges.astype(np.float32))
    other = head.logprobs
    for _ in range(abs(ulps)):
        other = np.nextafter(other, np.float32(np.sign(ulps) * np.inf), dtype=np.float32)
    read = head_of(head.ids, other)
    require_same(through(counts, head, vocabulary=300, read=read), counts)


def test_without_the_list_of_doubtful_numbers_another_machine_reads_others(monkeypatch):
    """That the test above can fail."""
    monkeypatch.setattr(head_counts, "_DOUBT", 0.0)
    with pytest.raises((ValueError, AssertionError)):
        test_a_machine_with_other_last_bits_reads_the_same(1024)


def test_the_largest_vocabulary_and_a_full_set_fit():
    vocabulary = 1 << 20
    ids = np.linspace(0, vocabulary - 1, 1024).astype(np.int32)[None].repeat(3, 0)
    counts = Counts(ids, np.ones_like(ids), 1024)
    head = head_of(np.zeros((3, 0), np.int32), np.zeros((3, 0), np.float32))
    require_same(through(counts, head, vocabulary=vocabulary), counts)


def test_counts_that_the_head_foretells_cost_almost_nothing():
    logits = zipf_logits(512, 3000)
    sizes = {}
    for k in (0, 8, 64):
        counts, head = drawn(logits, draws=50, k=k)
        block = counts_field.encode(counts, head=head, tables=tables_for(3000, k), vocabulary=3000)
        sizes[k] = len(block.payload)
    assert sizes[64] < sizes[8] < sizes[0]


@pytest.mark.parametrize(
    ("ids", "counts", "error"),
    [
        ([[1, 2]], [[1, 1]], "do not sum to 3"),
        ([[2, 2]], [[1, 2]], "not distinct and ascending"),
        ([[2, 1]], [[1, 2]], "not distinct and ascending"),
        ([[1, 9]], [[1, 2]], "outside the vocabulary of 9"),
        ([[1, -1]], [[1, 2]], "outside the vocabulary of 9"),
        ([[1, 2, 3]], [[4, -1, 0]], "a count below 0"),
        ([[0, 2]], [[0, 3]], "an empty slot before a full one"),
    ],
)
def test_what_is_no_counts_is_not_encoded(ids, counts, error):
    made = Counts(np.array(ids, np.int32), np.array(counts, np.int32), 3)
    head = head_of(np.zeros((1, 0), np.int32), np.zeros((1, 0), np.float32))
    with pytest.raises(ValueError, match=error):
        counts_field.encode(made, head=head, tables=tables_for(9, 0), vocabulary=9)


@lru_cache
def a_payload(k: int) -> tuple[Counts, Targets, bytes]:
    counts, head = drawn(zipf_logits(60, 300), draws=20, k=k)
    block = counts_field.encode(counts, head=head, tables=tables_for(300, k), vocabulary=300)
    return counts, head, block.payload


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([0, 4]), st.data())
def test_a_damaged_payload_is_an_error_or_still_counts(k, data):
    counts, head, payload = a_payload(k)
    damaged = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([0, 0, 1, 7]))
    try:
        got = counts_field.decode(
            [Block(COUNTS, counts_field.JOINT, bytes(damaged[: len(damaged) - cut]))],
            positions=[len(counts)],
            draws=counts.draws,
            head=head,
            tables=tables_for(300, k),
            vocabulary=300,
        )
    except ValueError:
        return
    held = got.counts > 0
    assert (got.counts.sum(1) == counts.draws).all()
    assert (got.ids[held] < 300).all()
    assert (np.diff(got.ids, axis=1)[held[:, 1:]] > 0).all()


def test_a_codec_of_a_newer_release_is_named():
    counts, head, payload = a_payload(0)
    with pytest.raises(ValueError, match="codec 200 of counts is unknown to this release"):
        counts_field.decode(
            [Block(COUNTS, 200, payload)],
            positions=[len(counts)],
            draws=counts.draws,
            head=head,
            tables=tables_for(300, 0),
            vocabulary=300,
        )


def test_a_strangers_table_of_contexts_is_refused():
    arrays = tables_for(300, 0).arrays()
    require_tables(arrays, vocabulary=300)
    for wrong in (arrays["contexts"][:-1], arrays["contexts"].astype(np.int32)):
        with pytest.raises(ValueError, match="the codec's table contexts"):
            require_tables({**arrays, "contexts": wrong}, vocabulary=300)
