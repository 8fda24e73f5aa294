"""Rows: targets of positions worked by hand, records and keys."""

import dataclasses
import struct

import numpy as np
import pytest
import zstandard

from decant.schemas.disk.frames import Kind, unpack
from decant.schemas.records.rows import (
    Segment,
    build_row,
    decode_row,
    encode_row,
    loss_mask,
    next_tokens,
)


def segment(*tokens: int, source: int = 0, document: int = 0, start: int = 0) -> Segment:
    return Segment(np.array(tokens, np.int32), np.ones(len(tokens), bool), source, document, start)


def test_position_t_is_scored_against_token_t_plus_1_of_the_same_segment():
    row = build_row([segment(5, 6, 7), segment(8, 9)], length=7)
    assert row.tokens.tolist() == [5, 6, 7, 8, 9, 0, 0]
    assert row.segment_ids.tolist() == [1, 1, 1, 2, 2, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert row.loss_mask.tolist() == [True, True, False, True, False, False, False]
    assert next_tokens(row.tokens)[row.loss_mask].tolist() == [6, 7, 9]


def test_a_position_before_an_uncounted_token_is_not_scored():
    # A chat: the prompt 1 2 is only read, the answer 3 4 is learned.
    mask = loss_mask(np.array([1, 1, 1, 1]), np.array([False, False, True, True]))
    assert mask.tolist() == [False, True, True, False]


def test_padding_is_never_scored():
    assert not loss_mask(np.zeros(5, np.int32), np.ones(5, bool)).any()


def test_a_record_gives_back_the_row_and_its_key():
    segments = [
        segment(1, 2, 3, source=4, document=1 << 40, start=99),
        segment(70_000, 5, source=7),
    ]
    row = build_row(segments, length=8)
    read, key = decode_row(encode_row(row), where="here", length=8)
    assert key == row.key
    for name in ("tokens", "segment_ids", "positions", "loss_mask", "origins"):
        np.testing.assert_array_equal(getattr(read, name), getattr(row, name))
    assert read.origins.tolist() == [[4, 1 << 40, 99], [7, 0, 0]]


def test_segments_longer_than_the_row_are_an_error():
    record = encode_row(build_row([segment(1, 2), segment(3)], length=4))
    frame = unpack(record, kind=Kind.ROW, where="here")
    longer = [
        b._replace(payload=struct.pack("<II", 2, 3)) if b.field == 2 else b for b in frame.blocks
    ]
    altered = dataclasses.replace(frame, blocks=tuple(longer)).pack()
    with pytest.raises(ValueError, match="here: segments of 5 tokens in a row of 4"):
        decode_row(altered, where="here", length=4)


def altered(record: bytes, field: int, payload: bytes) -> bytes:
    frame = unpack(record, kind=Kind.ROW, where="here")
    blocks = [b._replace(payload=payload) if b.field == field else b for b in frame.blocks]
    return dataclasses.replace(frame, blocks=tuple(blocks)).pack()


@pytest.mark.parametrize(
    ("field", "payload", "error"),
    [
        (1, zstandard.compress(bytes(1 << 24)), "expected 8 bytes, got 16777216"),
        (1, zstandard.compress(bytes(8))[:-1], "tokens cannot be read"),
        (1, b"", "tokens cannot be read"),
        (2, bytes(3), "field 2 of 3 bytes is cut off"),
        (3, bytes(2), "a mask of 2 bytes"),
        (4, bytes(7), "field 4 of 7 bytes is cut off"),
        (4, bytes(24), "3 numbers of origins"),
    ],
)
def test_a_field_that_does_not_fit_the_row_is_an_error_of_the_record(field, payload, error):
    record = encode_row(build_row([segment(1, 2), segment(3)], length=4))
    with pytest.raises(ValueError, match=f"here: .*{error}"):
        decode_row(altered(record, field, payload), where="here", length=4)


def test_a_row_of_another_length_is_refused_before_anything_is_allocated():
    record = encode_row(build_row([segment(1, 2)], length=4))
    with pytest.raises(ValueError, match="here: expected a row of 8 positions, got 4"):
        decode_row(record, where="here", length=8)


def test_an_empty_row_is_a_row():
    row = build_row([], length=4)
    read, _ = decode_row(encode_row(row), where="here", length=4)
    assert not read.loss_mask.any()
    assert read.origins.shape == (0, 3)


@pytest.mark.parametrize("other", [[segment(5, 6, 8)], [segment(5, 6), segment(7)]])
def test_the_key_names_tokens_and_segments(other):
    assert build_row([segment(5, 6, 7)], length=4).key != build_row(other, length=4).key


def test_the_key_does_not_depend_on_where_the_text_came_from():
    ours, theirs = segment(5, 6, source=1), segment(5, 6, source=2, document=9)
    assert build_row([ours], length=4).key == build_row([theirs], length=4).key
