"""The building blocks of codecs: bit packing, levels, streams, the codebook."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decant.schemas.codecs import bits
from decant.schemas.codecs.block import Tables
from decant.schemas.codecs.codebook import codebook
from decant.schemas.codecs.levels import MINUS_INFINITY, STEPS, quantiser
from decant.schemas.codecs.normalise import normalise
from decant.schemas.codecs.streams import (
    cells,
    compress,
    decompress,
    escape,
    grid,
    join,
    split,
    unescape,
)

pairs = st.lists(st.tuples(st.integers(0, 24), st.integers(0, 2**24 - 1)), max_size=200)


@given(pairs)
def test_bits_of_any_width_come_back(pairs):
    widths = np.array([width for width, _ in pairs], np.uint8)
    values = np.array([value & (1 << width) - 1 for width, value in pairs], np.int32)
    packed = bits.pack(values, widths=widths)
    assert len(packed) == (int(widths.sum()) + 7) // 8
    np.testing.assert_array_equal(unpacked([packed], [widths])[0], values[None])


@given(st.lists(pairs, min_size=1, max_size=4), st.sampled_from([1, 3]))
def test_bits_of_many_records_come_back_with_their_leading_bits(records, rows):
    """Each record is an array of `rows` rows; its numbers are packed row by row."""
    records = [(record * rows)[: len(record) // rows * rows] for record in records]
    widths = [np.array([width for width, _ in r], np.uint8).reshape(rows, -1) for r in records]
    values = [np.array([v & (1 << w) - 1 for w, v in r], np.int64) for r in records]
    packed = [bits.pack(v, widths=w.reshape(-1)) for v, w in zip(values, widths, strict=True)]
    for values_back, width, value in zip(
        unpacked(packed, widths, above=5), widths, values, strict=True
    ):
        expected = value.reshape(rows, -1) | np.int64(5) << width.astype(np.int64)
        np.testing.assert_array_equal(values_back, expected)


def unpacked(packed: list[bytes], widths: list[np.ndarray], *, above: int = 0) -> list[np.ndarray]:
    """Unpack through a grid; the zero widths between records take no bits."""
    widths = [np.atleast_2d(width) for width in widths]
    columns = [width.shape[1] for width in widths]
    of_all = grid(len(widths[0]), columns)
    for cell, width in zip(cells(columns), widths, strict=True):
        of_all[:, cell] = width
    values = bits.unpack(packed, widths=of_all, above=np.full_like(of_all, above))
    return [values[:, cell] for cell in cells(columns)]


def test_bits_are_stored_least_significant_first():
    # 0b1, then 0b01, then 0b10110: read from the right, 10110·01·1.
    packed = bits.pack(np.array([1, 1, 0b10110]), widths=np.array([1, 2, 5], np.uint8))
    assert packed == bytes([0b10110_01_1])


def test_normalising_makes_one_distribution():
    logprobs = np.log([[0.5, 0.25]]).astype(np.float32)
    nodes = np.log([[0.5] * 7]).astype(np.float32)
    head, tail, shift = normalise(logprobs, nodes)
    np.testing.assert_allclose(shift[:, 0], [np.log(1.25)], rtol=1e-6)
    # 0.5 + 0.25 + 0.5 = 1.25; at β = 1/2 the factor counts half.
    np.testing.assert_allclose(np.exp(head[0]), [0.4, 0.2], rtol=1e-6)
    np.testing.assert_allclose(np.exp(tail[0, [0, 3, 6]]), [0.5, 0.5 / 1.25**0.5, 0.4], rtol=1e-6)


@pytest.mark.parametrize("head", [-np.inf, np.nan, np.inf, 0.3])
def test_what_is_no_distribution_is_not_normalised(head):
    nodes = np.full((1, 7), -np.inf, np.float32)
    with pytest.raises(ValueError, match="do not sum to one"):
        normalise(np.full((1, 2), head, np.float32), nodes)


def test_missing_or_surplus_bits_are_an_error():
    widths = np.array([8, 8], np.uint8)
    for length in (0, 1, 3):
        with pytest.raises(ValueError, match="2 are expected"):
            unpacked([bytes(length)], [widths])


def test_levels_cost_the_same_until_the_largest_step():
    cost, limit = STEPS
    logprob = quantiser(*STEPS).logprob[:-1].astype(np.float64)
    step, p = -np.diff(logprob), np.exp((logprob[1:] + logprob[:-1]).clip(-100) / 2)
    expected = np.minimum(limit, cost / np.sqrt(p * (1 - p)))
    inner = slice(20, 4000)  # nearer to p = 1 the formula varies within a step
    np.testing.assert_allclose(step[inner], expected[inner], rtol=0.02)


@given(st.lists(st.floats(-900, 0, width=32), min_size=1, max_size=50))
def test_a_level_decodes_to_within_half_a_step(values):
    ours = quantiser(*STEPS)
    logprobs = np.array([values], np.float32)
    error = np.abs(ours.logprob[ours.levels(logprobs)] - logprobs)
    assert error.max() < STEPS[1] / 2 + 1e-3


def test_levels_keep_the_order_and_log_zero_has_its_own_level():
    ours = quantiser(*STEPS)
    falling = np.append(-np.geomspace(1e-6, 1e6, 10_000), -np.inf).astype(np.float32)[None]
    levels = ours.levels(falling)[0].astype(int)
    assert (np.diff(levels) >= 0).all()
    assert levels[-1] == MINUS_INFINITY > levels[-2]
    assert ours.logprob[levels[-1]] == -np.inf
    assert ours.levels(np.float32([[0.0, 1e-6]])).tolist() == [[0, 0]]


@settings(deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 3))
def test_streams_come_back_and_never_grow(data, repeat):
    values = np.frombuffer(data * (1 + repeat), np.uint8)
    section = compress(values)
    assert len(section) <= len(values)
    np.testing.assert_array_equal(decompress([section], sizes=[len(values)]), values)


def test_a_stream_of_another_length_than_is_expected_is_an_error():
    values = np.arange(2000) % 7
    section = compress(values.astype(np.uint8))
    assert len(section) < 1000
    for size in (0, 1, 1999, 2001):
        with pytest.raises(ValueError, match=r"damaged|are expected"):
            decompress([section], sizes=[size])
    one_byte = bytes([1 << 3 | 1, 0, 0, 97])  # zstd's last block, raw
    assert decompress([one_byte], sizes=[1]).tolist() == [97]
    with pytest.raises(ValueError, match="0 are expected"):
        decompress([one_byte], sizes=[0])
    for damaged in (section[:-1], section + b"\0", section + section, b""):
        with pytest.raises(ValueError, match="damaged"):
            decompress([damaged], sizes=[2000])


def test_sections_must_fill_the_payload():
    sections = [b"", b"a" * 200, b"xyz"]
    payload = join(sections)
    assert split(payload, count=3) == sections
    for wrong in (payload[:-1], payload + b"\0", payload[:1]):
        with pytest.raises(ValueError, match="payload of"):
            split(wrong, count=3)


@given(st.lists(st.integers(0, 4095), max_size=50))
def test_escaped_bytes_come_back(values):
    values = np.array(values, np.uint32)
    codes, escapes = escape(values)
    assert len(escapes) == 2 * (values >= 255).sum()
    codes, columns = codes[None], [len(values)]
    np.testing.assert_array_equal(unescape(codes, [escapes], columns=columns), values[None])
    with pytest.raises(ValueError, match="escaped"):
        unescape(codes, [escapes + b"\0\0"], columns=columns)


def hand_made() -> Tables:
    """Ids by frequency: 5, 3, 8. Two orders, each listing two of them."""
    return Tables(
        {
            "order": np.array([5, 3, 8], np.int32),
            "orders": np.array([[0, 1], [2, 0]], np.uint16),
        }
    )


def test_ids_that_an_order_lists_come_first_and_all_others_by_rank():
    book = codebook(hand_made(), vocabulary=10)
    # By rank: 5 3 8, then 0 1 2 4 6 7 9. Order 1 lists 8 and 5.
    ids = np.array([[8, 5, 3, 0, 9]], np.int32)
    places = book.places(ids, chosen=np.array([1]))
    np.testing.assert_array_equal(places, [[0, 1, 2 + 1, 2 + 3, 2 + 9]])
    np.testing.assert_array_equal(book.ids(places.T, chosen=np.array([1])), ids.T)


def test_the_order_that_lists_a_set_is_chosen():
    book = codebook(hand_made(), vocabulary=10)
    sets = np.array([[5, 3], [5, 8]], np.int32)
    np.testing.assert_array_equal(book.choose(sets), [0, 1])
